"""The code of a run, copied when it is submitted: what runs after a requeue is what was submitted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from framework import __version__
from framework.files import replace_text
from framework.tracking.git import git_diff, git_state, masked
from framework.training.storage import explain_os_error

__all__ = ["PACKAGES", "take_snapshot"]

PACKAGES = ("framework", "launch", "data_tools", "recipes")
_ROOT = Path(__file__).resolve().parent.parent


def take_snapshot(folder: Path) -> dict[str, str]:
    """Copy the code that this process runs into `folder`; returns commit and branch, empty without git.

    Beside the packages lie `git.json` and, where there are uncommitted changes, `git.diff`.

    Errors:
        CheckpointError: the folder cannot be written.
    """
    state = git_state(_ROOT / "framework")
    fresh = folder.with_name(folder.name + ".new")
    with explain_os_error(folder):
        shutil.rmtree(fresh, ignore_errors=True)
        for package in PACKAGES:
            shutil.copytree(
                _ROOT / package, fresh / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        replace_text(fresh / "git.json", json.dumps({"version": __version__, **state}, indent=1) + "\n")
        if state.get("dirty") == "true":
            replace_text(fresh / "git.diff", masked(git_diff(_ROOT / "framework")))
        if folder.is_symlink():  # to the code of a sweep, of which this run is an element
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return state
