"""What operators ask of a running training, through small files in the run folder.

RUN/control/ID.json         a request: {"id", "command", "argument", "time"}, there in one piece
RUN/control/ID-answer.json  its answer: {"id", "done", "text", "step"}, taken away by who has asked
RUN/stacks/ID/              answers to `stack`, one file a rank

Each request is a file of its own, so that none is lost, whoever else asks at the same moment; an ID begins
with the time. Rank 0 looks for requests at step boundaries, does the oldest first, each once, and takes it
away when it is answered. What lies there when an attempt begins was asked of one before: it is refused, for
whoever asked may have been killed before it was withdrawn. `stack` is answered by the sentinels, because it
is wanted most when no step ends any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
    "MOST_PROFILED",
    "is_count",
    "read_answer",
    "send_request",
    "serve_stacks",
    "stacks_folder",
    "waiting_requests",
    "withdraw",
]

COMMANDS = ("checkpoint", "stack", "profile", "stop", "exclude")
MOST_PROFILED = 100
"""Steps of a profile: its trace grows with each of them, and other requests wait until it is written."""
POLL_SECONDS = 1.0
"""How often rank 0 looks for a request; a look lists one small folder."""
UNFETCHED_SECONDS = 3600.0
"""After so long nobody comes for an answer: who waits looks ten times a second."""
REQUEST_ID = re.compile(r"\d{20}-[0-9a-f]{8}")


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


def request_path(run: Path, request_id: str) -> Path:
    """Where a request lies."""
    return run / "control" / f"{request_id}.json"


def answer_path(run: Path, request_id: str) -> Path:
    """Where the answer to a request lies."""
    return run / "control" / f"{request_id}-answer.json"


def send_request(run: Path, command: str, argument: str = "") -> Request:
    """Ask something of the training in a run folder; others may wait for an answer already.

    Errors:
        TubeworksError: the folder cannot be written.
    """
    request = Request(f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}", command, argument, time.time())
    path = request_path(run, request.id)
    try:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, json.dumps(asdict(request)) + "\n")
    except OSError as error:
        raise TubeworksError(f"{path} cannot be written: {error.strerror}") from error
    return request


def waiting_requests(run: Path) -> list[Request]:
    """The requests that wait for an answer, oldest first; one that is not understood is `unreadable`.

    Errors:
        OSError: the folder is there and cannot be read.
    """
    try:
        names = sorted(name.removesuffix(".json") for name in os.listdir(run / "control"))
    except FileNotFoundError:
        return []
    found = (_read_request(run, name) for name in names if REQUEST_ID.fullmatch(name))
    return [request for request in found if request is not None]


def _read_request(run: Path, request_id: str) -> Request | None:
    try:
        raw = json.loads(request_path(run, request_id).read_text(encoding="utf-8"))
        return Request(request_id, str(raw["command"]), str(raw["argument"]), float(raw["time"]))
    except FileNotFoundError:  # withdrawn
        return None
    except (ValueError, KeyError, TypeError):
        return Request(request_id, "unreadable")


def read_answer(run: Path, request: Request) -> Answer | None:
    """The answer to a request, or None as long as there is none."""
    try:
        raw = json.loads(answer_path(run, request.id).read_text(encoding="utf-8"))
        return Answer(str(raw["id"]), bool(raw["done"]), str(raw["text"]), int(raw["step"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def withdraw(run: Path, request: Request) -> None:
    """Take a request and its answer away."""
    request_path(run, request.id).unlink(missing_ok=True)
    answer_path(run, request.id).unlink(missing_ok=True)


class Mailbox:
    """Rank 0's side of an attempt: one request after the other, and its answer."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._looked = 0.0
        self._open: Request | None = None
        self._taken: set[str] = set()
        """Requests that are not taken up again, even if they cannot be taken away."""

    def look(self) -> Request | None:
        """A request that has not been taken up yet."""
        now = time.monotonic()
        if self._open is not None or now - self._looked < POLL_SECONDS:
            return None
        self._looked = now
        self._open = next(iter(self._untaken()), None)
        if self._open is not None:
            self._taken.add(self._open.id)
        return self._open

    def answer(self, done: bool, text: str, step: int) -> None:
        """Answer the request that was taken up, and take it away."""
        if self._open is None:
            return
        request, self._open = self._open, None
        self._answer(request, Answer(request.id, done, text, step))

    def refuse(self, text: str, step: int) -> None:
        """Answer all that wait: nobody will do what they ask.

        Errors:
            OSError: one of them cannot be answered; none of them will be taken up all the same.
        """
        waiting = self._untaken()
        self._taken.update(one.id for one in waiting)
        self.answer(False, text, step)
        for request in waiting:
            self._answer(request, Answer(request.id, False, text, step))

    def sweep(self) -> None:
        """Take answers away, and requests for stacks, that nobody has come for.

        Errors:
            OSError: the folder is there and cannot be read or written.
        """
        folder = self._run / "control"
        for path in folder.iterdir() if folder.exists() else ():
            if REQUEST_ID.fullmatch(path.stem.removesuffix("-answer")):
                with contextlib.suppress(FileNotFoundError):  # just fetched
                    if time.time() - path.stat().st_mtime > UNFETCHED_SECONDS:
                        path.unlink()

    def _untaken(self) -> list[Request]:
        waiting = waiting_requests(self._run)
        return [one for one in waiting if one.command != "stack" and one.id not in self._taken]

    def _answer(self, request: Request, answer: Answer) -> None:
        path = request_path(self._run, request.id)
        if path.exists():  # else nobody waits any more
            try:
                replace_text(answer_path(self._run, request.id), json.dumps(asdict(answer)) + "\n")
            finally:
                path.unlink(missing_ok=True)


def stacks_folder(run: Path, request: Request) -> Path:
    """Where the ranks' answers to `stack` lie."""
    return run / "stacks" / request.id


def serve_stacks(run: Path, rank: int, stacks: Callable[[], str]) -> None:
    """A sentinel's side: answer the requests for stacks that it has not answered yet."""
    for request in waiting_requests(run):
        target = stacks_folder(run, request) / f"rank-{rank:05d}.txt"
        if request.command == "stack" and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_suffix(".tmp")
            temporary.write_text(stacks(), encoding="utf-8")
            temporary.replace(target)


def is_count(text: str) -> bool:
    """Whether a text is a number of steps to profile: from 1 to `MOST_PROFILED`."""
    return text.isascii() and text.isdigit() and len(text) < 7 and 0 < int(text) <= MOST_PROFILED


def excluded_nodes(run: Path) -> list[str]:
    """The nodes that an operator took out of a run with `launch ctl RUN exclude NODE`."""
    try:
        return [str(node) for node in json.loads((run / "excluded-nodes.json").read_text(encoding="utf-8"))]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, TypeError):
        return []
