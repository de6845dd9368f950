"""Worker processes that end with their parent, stop when asked, and count what they have done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from framework.errors import DataError

__all__ = ["Advance", "available_cores", "progress_bar", "run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")

_counter: Any = None
_stop: Any = None


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
) -> Iterator[Result]:
    """Results of `function(task, advance)` in the order in which they finish.

    One worker works in this process; more are fresh processes, so `function` and tasks must pickle.
    `progress` gets the number of pieces done so far. An exception of a task ends the run and is raised here.
    """
    workers = min(workers, len(tasks))
    if workers > 1:
        yield from _run_in_processes(function, tasks, workers, progress)
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done)

    for task in tasks:
        yield function(task, advance)


def _run_in_processes(
    function: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[Result]:
    # Not fork: the parent may have threads (progress bar), and decoders do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Value("b", 0)
    executor = ProcessPoolExecutor(workers, context, _initialise, (counter, stop))
    try:
        pending = {executor.submit(_call, function, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            progress(counter.value)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (out of memory, killed, or a decoder crashed on a damaged file); what is"
            " finished is kept: run the same command again, with --workers 1 if it happens again"
        ) from error
    finally:
        stop.value = 1
        executor.shutdown(wait=True, cancel_futures=True)


def _initialise(counter: Any, stop: Any) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells us
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(function: Callable[[Any, Advance], Result], task: Any) -> Result:
    return function(task, _advance_shared)


def _advance_shared() -> None:
    with _counter.get_lock():
        _counter.value += 1
    if _stop.value:
        raise Stopped


@contextmanager
def progress_bar(title: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if that is a terminal (or if `shown` says so); yields the function that sets it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disable = not (console.is_terminal if shown is None else shown)
    with Progress(*columns, console=console, disable=disable, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
