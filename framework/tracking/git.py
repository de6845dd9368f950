"""What code a run was started from: commit, branch, uncommitted changes."""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path

__all__ = ["git_diff", "git_state", "masked"]

logger = logging.getLogger(__name__)

SECONDS = 10
DIFF_BYTES = 1_000_000


def git_state(folder: Path | None = None) -> dict[str, str]:
    """Commit, branch, remote (without passwords) and `dirty` of the repository that holds `folder`.

    `folder` is by default where this package lies, so that the state is that of the code that runs. Empty
    when that is no git repository (an installed wheel) or git is not there; the version still tells then.
    """
    folder = Path(__file__).resolve().parent if folder is None else Path(folder)
    commit = _git(folder, "rev-parse", "HEAD")
    # A package that lies inside somebody else's repository (a virtual environment in it) is not its code.
    if not commit or _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return {}
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "",
        "remote": masked(_git(folder, "config", "--get", "remote.origin.url") or ""),
        "dirty": "unknown" if status is None else str(bool(status)).lower(),
    }


def git_diff(folder: Path | None = None) -> str:
    """The uncommitted changes to tracked files, at most a megabyte; empty when there are none."""
    folder = Path(__file__).resolve().parent if folder is None else Path(folder)
    top = _git(folder, "rev-parse", "--show-toplevel")
    diff = _git(Path(top), "diff", "HEAD", "--no-color", "--no-ext-diff") if top else None
    if diff and len(diff) > DIFF_BYTES:
        return diff[:DIFF_BYTES] + f"\n[cut: the whole diff has {len(diff)} characters]\n"
    return diff + "\n" if diff else ""


def masked(text: str) -> str:
    """The text with the user names and passwords of its addresses replaced: `https://***@host/`."""
    return re.sub(r"(\w[\w+.-]*://)[^/\s]+@", r"\1***@", text)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None when it fails, is not installed, or takes too long."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.debug("git %s: %s", arguments[0], error)
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
