"""What an operator asks of a running training, through two small files in the run folder.

RUN/control.json         the request: {"id", "command", "argument", "time"}, replaced in one piece
RUN/control-answer.json  the answer to the request of that id: {"id", "done", "text", "step"}
RUN/stacks/ID/           answers to `stack`, one file a rank

Rank 0 looks for a request at step boundaries and takes it away when it is answered. `stack` is answered by
the sentinels, because it is wanted most when no step ends any more.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from framework.errors import TubeworksError
from framework.files import replace_text

__all__ = [
    "COMMANDS",
    "Answer",
    "Mailbox",
    "Request",
    "excluded_nodes",
    "is_count",
    "read_answer",
    "read_request",
    "send_request",
    "serve_stacks",
    "stacks_folder",
    "withdraw",
]

COMMANDS = ("checkpoint", "stack", "profile", "stop", "exclude")
POLL_SECONDS = 1.0
"""How often rank 0 looks for a request; a look is one `stat`."""


@dataclass(frozen=True)
class Request:
    """Something that is asked of a training."""

    id: str
    command: str
    argument: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    id: str
    done: bool
    text: str
    step: int


def request_path(run: Path) -> Path:
    """Where a request lies."""
    return run / "control.json"


def answer_path(run: Path) -> Path:
    """Where the last answer lies."""
    return run / "control-answer.json"


def send_request(run: Path, command: str, argument: str = "") -> Request:
    """Ask something of the training in a run folder.

    Errors:
        TubeworksError: another request waits for its answer.
    """
    waiting = read_request(run)
    if waiting is not None:
        raise TubeworksError(
            f"{run} has a request that waits for its answer: {waiting.command}. Wait, or remove "
            f"{request_path(run)} when no training works there any more"
        )
    request = Request(uuid.uuid4().hex[:12], command, argument, time.time())
    replace_text(request_path(run), json.dumps(asdict(request)) + "\n")
    return request


def read_request(run: Path) -> Request | None:
    """The request that waits, or None; one that cannot be read is the command `unreadable`, which none is."""
    try:
        raw = json.loads(request_path(run).read_text(encoding="utf-8"))
        return Request(str(raw["id"]), str(raw["command"]), str(raw["argument"]), float(raw["time"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Request("", "unreadable")


def read_answer(run: Path, request: Request) -> Answer | None:
    """The answer to a request, or None as long as there is none."""
    try:
        raw = json.loads(answer_path(run).read_text(encoding="utf-8"))
        answer = Answer(str(raw["id"]), bool(raw["done"]), str(raw["text"]), int(raw["step"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return answer if answer.id == request.id else None


def withdraw(run: Path, request: Request) -> None:
    """Take a request away, if it still is that one."""
    if read_request(run) == request:
        request_path(run).unlink(missing_ok=True)


class Mailbox:
    """Rank 0's side: at most one request at a time, and its answer."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._looked = 0.0
        self._open: Request | None = None

    def look(self) -> Request | None:
        """A request that has not been taken up yet."""
        now = time.monotonic()
        if self._open is not None or now - self._looked < POLL_SECONDS:
            return None
        self._looked = now
        request = read_request(self._run)
        if request is None or request.command == "stack":
            return None
        self._open = request
        return request

    def answer(self, done: bool, text: str, step: int) -> None:
        """Answer the request that was taken up, and take it away."""
        if self._open is None:
            return
        answer = Answer(self._open.id, done, text, step)
        replace_text(answer_path(self._run), json.dumps(asdict(answer)) + "\n")
        withdraw(self._run, self._open)
        self._open = None


def stacks_folder(run: Path, request: Request) -> Path:
    """Where the ranks' answers to `stack` lie."""
    return run / "stacks" / request.id


def serve_stacks(run: Path, rank: int, answered: str, stacks: Callable[[], str]) -> str:
    """A sentinel's side: answer a new `stack` request; returns the id of the last one that was answered."""
    if not os.path.exists(request_path(run)):
        return answered
    request = read_request(run)
    if request is None or request.command != "stack" or request.id == answered:
        return answered
    folder = stacks_folder(run, request)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"rank-{rank:05d}.tmp"
    temporary.write_text(stacks(), encoding="utf-8")
    temporary.replace(temporary.with_suffix(".txt"))
    return request.id


def is_count(text: str) -> bool:
    """Whether a text is a number of steps that an exchange between ranks can carry."""
    return text.isascii() and text.isdigit() and len(text) < 7 and int(text) > 0


def excluded_nodes(run: Path) -> list[str]:
    """The nodes that an operator took out of a run with `launch ctl RUN exclude NODE`."""
    try:
        return [str(node) for node in json.loads((run / "excluded-nodes.json").read_text(encoding="utf-8"))]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, TypeError):
        return []
