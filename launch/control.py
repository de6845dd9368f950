"""`tubeworks launch ctl`: ask something of a training that runs, wherever it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import typer

from framework.errors import TubeworksError
from framework.watch.attempts import attempts_of
from framework.watch.control import (
    MOST_PROFILED,
    Request,
    is_count,
    read_answer,
    send_request,
    stacks_folder,
    withdraw,
)

__all__ = ["control_command"]

Found = TypeVar("Found")


def control_command(run: Path, command: str, argument: str | None, wait: float, as_json: bool) -> None:
    """Send a request, wait for its answer, and print it.

    Errors:
        TubeworksError: no training works in the folder, an argument does not fit, or nobody answers in time.
    """
    attempts = attempts_of(run)
    if not attempts:
        raise TubeworksError(f"{run} is not the folder of a run that has begun")
    if "cause" in attempts[-1]:
        ended = f"its last attempt ended ({attempts[-1]['cause']}) at {attempts[-1]['ended']}"
        raise TubeworksError(f"no training works in {run}: {ended}")
    request = send_request(run, command, _argument(command, argument))
    if command == "stack":
        _stacks(run, request, int(attempts[-1]["ranks"]), wait, as_json)
        return
    try:
        answer = _within(wait, lambda: read_answer(run, request))
    finally:  # also when the operator does not wait any longer
        withdraw(run, request)
    if answer is None:
        raise TubeworksError(
            f"nobody answered within {wait:.0f} s: the step is longer than that (--wait), a profile is being "
            f"taken, or the job hangs (`tubeworks launch ctl {run} stack` shows where)"
        )
    if as_json:
        typer.echo(json.dumps({"done": answer.done, "text": answer.text, "step": answer.step}))
    elif answer.done:
        typer.echo(answer.text)
    if not answer.done:
        raise TubeworksError(f"{command}: {answer.text}")


def _argument(command: str, argument: str | None) -> str:
    if command == "profile":
        text = argument or "3"
        if not is_count(text):
            raise TubeworksError(f"profile takes a number of steps from 1 to {MOST_PROFILED}, not {text!r}")
        return text
    if command == "exclude":
        if not argument:
            raise TubeworksError("exclude takes the name of a node")
        return argument
    if argument is not None:
        raise TubeworksError(f"{command} takes no argument, and got {argument!r}")
    return ""


def _stacks(run: Path, request: Request, ranks: int, wait: float, as_json: bool) -> None:
    """Collect what the sentinels write, one file a rank."""
    folder = stacks_folder(run, request)

    def all_there() -> list[Path] | None:
        files = sorted(folder.glob("rank-*.txt"))
        return files if len(files) >= ranks else None

    files = _within(wait, all_there) or sorted(folder.glob("rank-*.txt"))
    withdraw(run, request)
    if not files:
        raise TubeworksError(f"no rank of {run} answered within {wait:.0f} s: are its processes alive?")
    if as_json:
        texts = {path.stem: path.read_text(encoding="utf-8") for path in files}
        typer.echo(json.dumps({"ranks": ranks, "stacks": texts}))
        return
    for path in files:
        typer.echo(path.read_text(encoding="utf-8"))
    if len(files) < ranks:
        typer.echo(f"{ranks - len(files)} of {ranks} ranks did not answer", err=True)


def _within(seconds: float, look: Callable[[], Found | None]) -> Found | None:
    """What `look` finds, as soon as it finds something, or None when the time is over."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
