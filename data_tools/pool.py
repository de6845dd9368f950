"""Worker processes that end with their parent, stop when asked, and whose death costs one task at most.

A decoder that crashes or hangs on a damaged file takes its process along. Such a task is given to a new
process; where the same piece of work ends two of them, the caller is asked to take it out.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

from framework.errors import DataError

__all__ = ["Advance", "available_cores", "progress_bar", "run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Blame = Callable[[Task, int, str], Task]

_DEATHS_ON_ONE_PIECE = 2
_DEATHS_IN_A_ROW = 20
_NOT_BEGUN = -1
_START_SECONDS = 900.0
_LOG_EVERY = 30.0

_logger = logging.getLogger(__name__)


class Advance(Protocol):
    """Called by a task for each finished piece of work; raises Stopped if the run is being given up."""

    def __call__(self) -> None: ...


class Stopped(Exception):
    """The parent gave up; the task ends where it stands."""


def available_cores() -> int:
    """Cores that this process may use (a container or a job may own fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    workers: int,
    progress: Callable[[int], None],
    *,
    blame: Blame[Task] | None = None,
    patience: float = 900.0,
    isolate: bool = False,
) -> Iterator[Result]:
    """Results of `function(task, advance)` in the order in which they finish.

    One worker works in this process, unless `isolate`; others are fresh processes, so `function`, tasks and
    results must pickle. `progress` gets the number of pieces done so far. An exception of a task ends the run
    and is raised here. A process that dies, or finishes no piece in `patience` seconds, is replaced;
    `blame(task, piece, reason)` returns the task without the piece that did it twice. The start of a process
    is no piece's fault, however long it takes on a busy machine.

    Errors:
        DataError: processes die again and again, and there is no piece to blame.
    """
    workers = min(workers, len(tasks))
    if workers > 1 or (isolate and workers):
        crew = _Crew(function, tasks, progress, blame, patience)
        try:
            yield from crew.run(workers)
        finally:
            crew.end()
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done)

    for task in tasks:
        yield function(task, advance)


@dataclass
class _Worker:
    """A process, what it works on, and how many pieces of it are done."""

    process: BaseProcess
    connection: Connection
    pieces: Any
    task: Any = None
    number: int = 0
    seen: int = _NOT_BEGUN
    since: float = field(default_factory=time.monotonic)
    hung: bool = False


class _Crew(Generic[Task, Result]):
    """The processes of one run; knows who works on what."""

    def __init__(
        self,
        function: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        progress: Callable[[int], None],
        blame: Blame[Task] | None,
        patience: float,
    ) -> None:
        # Not fork: the parent may have threads (progress bar), and decoders do not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Value("b", 0, lock=False)
        self._function, self._tasks, self._progress = function, deque(enumerate(tasks)), progress
        self._blame, self._patience = blame, patience
        self._workers: list[_Worker] = []
        self._deaths: Counter[tuple[int, int]] = Counter()
        self._in_a_row = 0
        self._done = 0

    def run(self, workers: int) -> Iterator[Result]:
        """Hand out tasks until none is left."""
        for _ in range(workers):
            self._hire()
        while any(worker.task is not None for worker in self._workers):
            ready = wait([worker.connection for worker in self._workers if worker.task is not None], 0.2)
            for worker in list(self._workers):
                if worker.connection in ready:
                    yield from self._receive(worker)
                elif worker.task is not None and self._hangs(worker):
                    worker.hung = True
                    worker.process.kill()
            self._progress(self._done + sum(max(0, worker.seen) for worker in self._workers))

    def end(self) -> None:
        """End all processes; those in the middle of a task finish their piece first, within reason."""
        self._stop.value = 1
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _hire(self) -> None:
        if not self._tasks:
            return
        ours, theirs = self._context.Pipe()
        pieces = self._context.Value("q", 0, lock=False)
        arguments = (theirs, self._function, pieces, self._stop)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours, pieces)
        self._workers.append(worker)
        self._give(worker)

    def _give(self, worker: _Worker) -> None:
        worker.task, worker.seen, worker.pieces.value = None, _NOT_BEGUN, _NOT_BEGUN
        if not self._tasks:
            return
        (worker.number, worker.task), worker.since = self._tasks.popleft(), time.monotonic()
        try:
            worker.connection.send(worker.task)
        except OSError:  # it died between two tasks; reading from it will tell
            _logger.debug("a worker process is gone before it got a task")

    def _receive(self, worker: _Worker) -> Iterator[Result]:
        try:
            good, result = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if not good:
            raise result
        self._done += worker.pieces.value
        self._in_a_row = 0
        self._give(worker)
        yield result

    def _hangs(self, worker: _Worker) -> bool:
        if worker.pieces.value != worker.seen:
            worker.seen, worker.since = worker.pieces.value, time.monotonic()
        patience = self._patience if worker.seen != _NOT_BEGUN else max(self._patience, _START_SECONDS)
        return time.monotonic() - worker.since > patience

    def _bury(self, worker: _Worker) -> None:
        """A process is dead: its task goes to a new one, if need be without the piece that ended two."""
        worker.process.join()
        self._workers.remove(worker)
        reason = f"took more than {self._patience:g} s" if worker.hung else _ending(worker.process.exitcode)
        task, piece = worker.task, int(worker.pieces.value)
        self._in_a_row += 1
        place = (worker.number, piece)
        if piece != _NOT_BEGUN:
            self._deaths[place] += 1
        _logger.warning("a worker process ended (%s); its shard is made again", reason)
        if self._deaths[place] >= _DEATHS_ON_ONE_PIECE and self._blame is not None:
            task = self._blame(task, piece, reason)
            self._in_a_row, self._deaths[place] = 0, 0
        elif self._in_a_row >= _DEATHS_IN_A_ROW or self._deaths[place] > _DEATHS_ON_ONE_PIECE:
            raise DataError(
                f"worker processes die again and again ({reason}; out of memory?); what is finished is kept:"
                " run the same command again, with fewer --workers"
            )
        self._tasks.appendleft((worker.number, task))
        self._hire()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _work(connection: Connection, function: Callable[[Any, Advance], Any], pieces: Any, stop: Any) -> None:
    """The life of a worker process: tasks in, results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells us
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    def advance() -> None:
        pieces.value += 1
        if stop.value:
            raise Stopped

    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        pieces.value = 0
        try:
            answer = (True, function(task, advance))
        except Stopped:
            return
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            answer = (False, error)
        try:
            connection.send(answer)
        except OSError:
            return


@contextmanager
def progress_bar(title: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Progress with the time left; yields the function that sets how much is done.

    A bar on stderr if that is a terminal (or if `shown` says so), else a line in the log now and then.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disable = not (console.is_terminal if shown is None else shown)
    if disable:
        yield _ProgressLines(title, total)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


class _ProgressLines:
    """Says in the log how far it is, twice a minute."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._started = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said < _LOG_EVERY or not done:
            return
        self._said = now
        left = (self._total - done) * (now - self._started) / done
        _logger.info(
            "%s: %d of %d, about %s left", self._title, done, self._total, _clock(max(0, round(left)))
        )


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
