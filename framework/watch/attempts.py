"""How the attempts at a run began and ended, as `run.json` tells it; needs nothing but the run folder.

An entry of `attempts` has `attempt`, `start_step`, `ranks`, `host`, `hosts` and `started` from its begin, and
from its end `ended`, `end_step`, `cause`, `checkpoint` (step of the newest one then, or null) and, after a
crash, `accused` (rank -> why). Causes: `finished`, `stopped by SIGTERM`, `rollback`, `hang`, `died`,
`failed: …`, or `unknown` when nobody was left to write.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.files import replace_text
from framework.tracking.lock import RunLock

__all__ = [
    "attempts_of",
    "close_attempt",
    "close_own_attempt",
    "close_unknown",
    "forget_heartbeats",
    "newest_checkpoint",
]

log = logging.getLogger(__name__)


def newest_checkpoint(run: Path) -> int | None:
    """The step of the newest committed checkpoint, or None; its bytes are not verified here."""
    steps = []
    for path in (run / "checkpoints").glob("step-*/MANIFEST.json"):
        number = path.parent.name.removeprefix("step-")
        if number.isdigit():
            steps.append(int(number))
    return max(steps, default=None)


def attempts_of(run: Path) -> list[dict[str, Any]]:
    """The entries of a run; empty for a folder in which nothing has begun."""
    return _read(run).get("attempts", [])


def close_attempt(
    run: Path,
    attempt: int,
    *,
    cause: str,
    end_step: int,
    accused: Mapping[int, str] | None = None,
    alone: bool = False,
) -> None:
    """Write down how an attempt ended, unless that is known already.

    With `alone` nothing is written while another training holds the run: that one has filled in the end.

    Errors:
        OSError: the file cannot be written.
    """
    lock = RunLock(run, ".training.lock") if alone else None
    if lock is not None and not lock.acquire():
        return
    try:
        state = _read(run)
        entry = next((one for one in state.get("attempts", []) if one["attempt"] == attempt), None)
        if entry is None or "cause" in entry:
            return
        finish_entry(run, entry, cause, end_step)
        if accused:
            entry["accused"] = {str(rank): reason for rank, reason in accused.items()}
        replace_text(run / "run.json", json.dumps(state, indent=1, ensure_ascii=False) + "\n")
    finally:
        if lock is not None:
            lock.release()


def close_own_attempt(run: Path, attempt: int, cause: str, end_step: int) -> None:
    """Write down how this process's attempt ended, if that can be written: what ended it goes first."""
    try:
        close_attempt(run, attempt, cause=cause, end_step=end_step)
    except OSError as error:
        log.warning("run.json does not say how attempt %d ended: %s", attempt, error)


def forget_heartbeats(run: Path, attempt: int) -> None:
    """Remove the ranks' records of all but the attempt before this one: of many ranks they are many files."""
    for folder in (run / "heartbeat").glob("attempt-*"):
        number = folder.name.removeprefix("attempt-")
        if number.isdigit() and int(number) < attempt - 1:
            shutil.rmtree(folder, ignore_errors=True)


def close_unknown(run: Path, state: dict[str, Any]) -> None:
    """Fill in the ends of attempts that nobody was left to write, before another one begins."""
    for entry in state["attempts"]:
        if "cause" not in entry:
            steps = [entry["start_step"]]
            for path in (run / "heartbeat" / f"attempt-{entry['attempt']}").glob("rank-*.json"):
                try:
                    steps.append(int(json.loads(path.read_text(encoding="utf-8"))["step"]))
                except (OSError, ValueError, KeyError, TypeError):
                    continue
            finish_entry(run, entry, "unknown", max(steps))


def finish_entry(run: Path, entry: dict[str, Any], cause: str, end_step: int) -> None:
    """Add an end to an entry."""
    entry["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry["end_step"] = end_step
    entry["cause"] = cause
    entry["checkpoint"] = newest_checkpoint(run)


def _read(run: Path) -> dict[str, Any]:
    """What `run.json` says; nothing where there is none, or where it is damaged.

    Errors:
        OSError: it is there and cannot be read, which says nothing about what is in it.
    """
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
