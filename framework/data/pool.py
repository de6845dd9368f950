"""Items made by worker processes and handed out in order; a worker's death is an error, never a hang."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from framework.errors import DataError, TubeworksError

__all__ = ["Failure", "in_order", "pixel_memory"]

Item = TypeVar("Item")

_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_workers: set[BaseProcess] = set()


@dataclass(frozen=True)
class Failure:
    """An error as a value: torch would rebuild a raised one from its text, and lose its fields."""

    error: TubeworksError


def in_order(
    make: Callable[[int], Item | Failure], count: int, workers: int, prefetch: int
) -> Generator[Item, None, None]:
    """Yield make(0) … make(count - 1), made by forked workers that work ahead, or in this process.

    The workers begin at once, not when the first item is asked for: call it before the process grows large,
    because a page that the parent changes after the fork stays in memory twice.

    Errors:
        TubeworksError: what `make` returned as a `Failure`.
        DataError: a worker died.
    """
    if workers == 0 or count == 0:
        return (_checked(make(number)) for number in range(count))
    return _hand_out(*_start(make, count, min(workers, count), prefetch))


def _hand_out(iterator: Iterator[Any], children: list[BaseProcess]) -> Generator[Any, None, None]:
    """Yield what the workers make, and end them when nobody wants more."""
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                _raise_for_the_dead(children, error)
                raise
            yield _checked(item)
    finally:
        _end(children)  # first: torch would wait for each of them to finish its item
        del iterator


def pixel_memory(shape: Sequence[int]) -> torch.Tensor:
    """Zeroed uint8 memory for an item; in a worker shared memory, which the rank takes over without a copy.

    Left to the worker's queue, sharing would fail in its background thread, and the rank would wait for ever.

    Errors:
        DataError: there is not enough memory, or not enough shared memory.
    """
    try:
        pixels = torch.zeros(tuple(shape), dtype=torch.uint8)
    except RuntimeError as error:
        size = " x ".join(map(str, shape))
        raise DataError(
            f"no memory for pixels of {size} bytes (batch x 3 x frames x height x width): lower the mixture, "
            "evaluation.batch, or a source's size and clip.frames, or raise train.accumulation"
        ) from error
    if get_worker_info() is None:
        return pixels
    try:
        return pixels.share_memory_()
    except RuntimeError as error:
        raise DataError(
            f"no shared memory for {pixels.nbytes / 1e6:.1f} MB of pixels ({error}): "
            "make /dev/shm larger (docker: --shm-size), or lower data.workers and data.prefetch"
        ) from error


def _checked(item: Item | Failure) -> Item:
    if isinstance(item, Failure):
        raise item.error
    return item


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        return self._make(number)


def _start(
    make: Callable[[int], Any], count: int, workers: int, prefetch: int
) -> tuple[Iterator[Any], list[BaseProcess]]:
    """A running DataLoader and its processes."""
    parent = os.getpid()
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGCHLD) if in_main else None
    before = set(multiprocessing.active_children())
    with warnings.catch_warnings():
        # How many workers a machine bears is the recipe's affair, and how loaded it is the journal's.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader: DataLoader[Any] = DataLoader(
            _Made(make, count),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=lambda _: _begin_worker(parent),
            multiprocessing_context="fork",
            generator=torch.Generator(),  # else torch draws from the rank's own generator, and shifts it
        )
        iterator = iter(loader)
    if in_main:
        # torch's handler would raise a worker's death at any line of the program; `next` reports it in here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)
    children = [child for child in multiprocessing.active_children() if child not in before]
    _workers.update(children)
    return iterator, children


def _as_it_is(item: Any) -> Any:
    return item


def _begin_worker(parent: int) -> None:
    """In a new worker: leave signals to the rank, and die with it.

    A scheduler signals whole process groups. The rank then wants to finish its step and save, and for that it
    needs its workers; it ends them itself, and if it is killed, the kernel does.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _raise_for_the_dead(children: list[BaseProcess], cause: BaseException) -> None:
    """Raise DataError if a worker is dead, saying of what it usually dies so."""
    dead = [child for child in children if child.exitcode not in (None, 0)]
    if not dead:
        return
    code = dead[0].exitcode or 0
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    advice = {
        -signal.SIGKILL: "most likely the machine ran out of memory: lower data.workers, data.prefetch or "
        "the mixture, or raise train.accumulation",
        -signal.SIGBUS: "most likely shared memory is full: make /dev/shm larger (docker: --shm-size), or "
        "lower data.workers and data.prefetch",
    }.get(code, "its last words are above; with data.workers=0 the same happens in the rank itself")
    raise DataError(f"data worker {dead[0].pid} was ended by {name}: {advice}") from cause


def _end(children: list[BaseProcess]) -> None:
    for child in children:
        child.kill()
    for child in children:
        child.join()
        _workers.discard(child)


def _end_all() -> None:
    _end(list(_workers))


atexit.register(_end_all)  # after multiprocessing's own hook, which torch has imported, hence run before it
