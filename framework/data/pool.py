"""Items made by worker processes and handed out in order; a worker that dies or hangs is replaced.

The item that a lost worker was at is made again. If the same sample costs a second worker, the maker is told
to do without it: good samples are not given up because the machine ran out of memory once.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import selectors
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from framework.data import messages, progress, shared_memory
from framework.data.nursery import Nursery
from framework.data.progress import Doing
from framework.errors import DataError, TubeworksError

__all__ = ["Care", "Failure", "Items", "Lost", "in_order", "pixel_memory"]

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_TICK = 0.25
_BLAMED_AFTER = 2
_GIVES_UP_AFTER = 4


@dataclass(frozen=True)
class Failure:
    """An error as a value: raised in a worker it would arrive as a defect, with a traceback."""

    error: TubeworksError


@dataclass(frozen=True)
class Lost:
    """Told to the maker: workers died or hung on this sample; `source` is the number it reported."""

    source: int
    index: int
    reason: str


@dataclass(frozen=True)
class Care:
    """How a pool looks after its workers.

    `decode_seconds` and `read_seconds` bound how long a worker may stay at one stage of a sample without a
    sign of life; `told` is called in the workers with what `Items.tell` and the pool itself have to say;
    `describe(source, index)` names a sample.
    """

    decode_seconds: float = math.inf
    read_seconds: float = math.inf
    told: Callable[[Any], None] | None = None
    describe: Callable[[int, int], str] = "sample {1} of source {0}".format


class Items(Iterator[Item], Generic[Item]):
    """make(0) … make(count - 1) in order; `close` ends whoever makes them."""

    def __init__(self, make: Callable[[int], Item | Failure], count: int, care: Care) -> None:
        self._make = make
        self._count = count
        self._care = care
        self._next = 0
        self.transfer_seconds = 0.0
        """Time that taking in items from other processes has cost this one."""

    def __next__(self) -> Item:
        if self._next >= self._count:
            self.close()
            raise StopIteration
        number = self._next
        self._next += 1
        try:
            return self.redo(number)
        except BaseException:
            self._next = self._count
            self.close()
            raise

    def redo(self, number: int) -> Item:
        """An item out of its turn, made anew.

        Errors:
            TubeworksError: what `make` returned as a `Failure`.
            DataError: workers are lost again and again.
        """
        return _checked(self._make(number))

    def tell(self, value: Any) -> None:
        """Tell the maker something; items that are begun from now on know of it."""
        if self._care.told is not None:
            self._care.told(value)

    def memory(self) -> int:
        """Bytes that the largest worker has for itself; 0 where this process makes the items."""
        return 0

    def close(self) -> None:
        """End the workers; a second call does nothing."""


def in_order(
    make: Callable[[int], Item | Failure], count: int, workers: int, prefetch: int, care: Care | None = None
) -> Items[Item]:
    """Make items by forked workers that work `prefetch` items ahead each, or, without workers, in this
    process.

    The workers begin at once, not when the first item is asked for: call it before the process grows large,
    because a page that the parent changes after the fork stays in memory twice.

    Errors, of the iteration:
        TubeworksError: what `make` returned as a `Failure`.
        DataError: workers are lost again and again, without one sample being the reason.
    """
    care = care or Care()
    if workers == 0 or count == 0:
        return Items(make, count, care)
    return _Pooled(make, count, min(workers, count), prefetch, care)


def pixel_memory(shape: Sequence[int]) -> torch.Tensor:
    """Uint8 memory for an item to fill; in a worker shared memory, which the rank takes over without a copy.

    Errors:
        DataError: there is not enough memory.
    """
    size = math.prod(shape)
    try:
        if progress.in_worker():
            return shared_memory.shared_memory(size).view(tuple(shape))
        return torch.empty(tuple(shape), dtype=torch.uint8)
    except (RuntimeError, OSError, OverflowError, ValueError) as error:
        text = " x ".join(map(str, shape))
        raise DataError(
            f"no memory for pixels of {text} bytes ({size / 1e6:.1f} MB: batch [x views] x frames x "
            f"height x width x 3; {_first_line(error)}): lower the mixture, evaluation.batch, data.workers, "
            "data.prefetch, or a source's size and clip.frames, or raise train.accumulation"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _checked(item: Item | Failure) -> Item:
    if isinstance(item, Failure):
        raise item.error
    return item


@dataclass
class _Worker:
    slot: int
    pid: int
    connection: socket.socket
    tasks: dict[int, list[shared_memory.Memory]] = field(default_factory=dict)
    """Items that it was asked for, in this order, and the memory that it was lent for each."""
    seen: int = -1
    quiet: float = 0.0
    """Seconds that its rank has waited without a sign of life."""
    memory: int = 0


class _RemoteError(Exception):
    """The traceback of an error in a worker."""


class _Pooled(Items[Item]):
    """The rank's side of the workers."""

    def __init__(
        self, make: Callable[[int], Item | Failure], count: int, workers: int, prefetch: int, care: Care
    ) -> None:
        super().__init__(make, count, care)
        self._prefetch = prefetch
        self._board = progress.Board(workers)
        self._nursery = Nursery(make, care.told, self._board)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._told: list[Any] = []
        self._asked = 0
        """Items 0 … asked - 1 were given to workers."""
        self._made: dict[int, Any] = {}
        self._lent = shared_memory.Lent()
        self._deaths: dict[tuple[int, int], int] = {}
        self._losses: dict[int, int] = {}
        self._closed = False
        _pools.add(self)
        for slot in range(workers):
            self._spawn(slot)
        self._ask()

    def redo(self, number: int) -> Item:
        if number < self._asked and number not in self._made and not self._is_asked(number):
            self._give(self._least_busy(), number)
        while number not in self._made:
            self._ask()
            if not self._take(_TICK):
                self._look_for_the_hung(number)
        item, defect = self._made.pop(number)
        self._ask()
        if defect is not None:
            error, text = defect
            raise error from _RemoteError(f"in a data worker:\n{text}")
        return _checked(item)

    def tell(self, value: Any) -> None:
        self._told.append(value)
        for worker in self._workers:
            self._say(worker, ("told", value))

    def memory(self) -> int:
        return max((worker.memory for worker in self._workers), default=0)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        _pools.discard(self)
        for worker in self._workers:
            _kill(worker.pid)
            worker.connection.close()
        self._selector.close()
        self._nursery.close()
        self._made.clear()
        self._lent.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _spawn(self, slot: int) -> None:
        try:
            pid, connection = self._nursery.spawn(slot)
        except messages.Closed as error:
            raise DataError(
                f"the process that starts data workers is gone ({error}): something ended it; start again, "
                "the run goes on from its last checkpoint"
            ) from error
        connection.settimeout(max(10.0, min(self._care.decode_seconds, 600.0)))
        worker = _Worker(slot, pid, connection)
        self._workers.append(worker)
        self._selector.register(connection, selectors.EVENT_READ, worker)
        for value in self._told:
            self._say(worker, ("told", value))

    def _is_asked(self, number: int) -> bool:
        return any(number in worker.tasks for worker in self._workers)

    def _least_busy(self) -> _Worker:
        return min(self._workers, key=lambda worker: len(worker.tasks))

    def _ask(self) -> None:
        """Keep every worker busy, as far ahead of who takes the items as was wished for."""
        ahead = self._next + len(self._workers) * self._prefetch
        while self._asked < min(self._count, ahead):
            worker = self._least_busy()
            if len(worker.tasks) >= self._prefetch:
                return
            self._give(worker, self._asked)
            self._asked += 1

    def _give(self, worker: _Worker, number: int) -> None:
        worker.tasks[number] = self._lent.lend()
        self._say(worker, ("make", (number, worker.tasks[number], len(self._lent))))

    def _say(self, worker: _Worker, message: Any) -> None:
        with contextlib.suppress(messages.Closed):  # it is dead, which shows when its answer is read
            messages.send(worker.connection, message)

    def _take(self, seconds: float) -> bool:
        """Take in what workers have made; False if nothing came within the time."""
        began = time.monotonic()
        ready = self._selector.select(seconds)
        for key, _ in ready:
            worker: _Worker = key.data
            arrived = time.perf_counter()
            try:
                number, item, defect, worker.memory = messages.receive(worker.connection, self._lent)
            except messages.Closed:
                self._bury(worker, hung=False)
                continue
            self.transfer_seconds += time.perf_counter() - arrived
            self._lent.settle(worker.tasks.pop(number))
            worker.quiet = 0.0
            self._losses.pop(number, None)
            self._made[number] = (item, defect)
        # A rank that was itself suspended must not think that its workers were silent all the time.
        passed = min(time.monotonic() - began, 2 * _TICK)
        for worker in self._workers:
            changes = self._board.read(worker.slot).changes
            worker.quiet = worker.quiet + passed if changes == worker.seen else 0.0
            worker.seen = changes
        return bool(ready)

    def _look_for_the_hung(self, number: int) -> None:
        """Kill the worker that has the item we wait for, if it has shown no sign of life for too long."""
        for worker in [one for one in self._workers if number in one.tasks]:
            doing = self._board.read(worker.slot)
            limit = self._care.read_seconds if doing.stage == "read" else self._care.decode_seconds
            if worker.quiet > limit:
                self._bury(worker, hung=True)

    def _bury(self, worker: _Worker, *, hung: bool) -> None:
        """Replace a worker that is dead or hangs, and give what it was at to others."""
        _kill(worker.pid)
        code = self._nursery.reap(worker.pid)
        doing = self._board.read(worker.slot)
        self._selector.unregister(worker.connection)
        worker.connection.close()
        self._workers.remove(worker)
        how = f"hung for {worker.quiet:.0f} s" if hung else f"was ended by {_ending(code)}"
        at = f" at {doing.stage} of {self._care.describe(doing.source, doing.index)}" if doing.stage else ""
        task = next(iter(worker.tasks), -1)
        self._judge(task, doing, how, code, f"data worker {worker.pid} {how}{at}")
        self._spawn(worker.slot)
        for number, memories in worker.tasks.items():
            self._lent.settle(memories)
            self._give(self._least_busy(), number)

    def _judge(self, task: int, doing: Doing, how: str, code: int | None, what: str) -> None:
        """Whether a lost worker is the sample's fault, the machine's, or not clear yet."""
        if code == -signal.SIGBUS:
            raise DataError(f"{what}: {_ADVICE[-signal.SIGBUS]}")
        self._losses[task] = self._losses.get(task, 0) + 1
        if doing.stage and doing.stage != "read":
            sample = doing.source, doing.index
            self._deaths[sample] = self._deaths.get(sample, 0) + 1
            if self._deaths[sample] >= _BLAMED_AFTER:
                self._losses[task] = 0
                log.warning("%s, again: the sample is left to the policy for corrupt ones", what)
                reason = f"costs data workers their lives: one {how} at {doing.stage}, {_BLAMED_AFTER} in all"
                self.tell(Lost(*sample, reason))
                return
        if self._losses[task] >= _GIVES_UP_AFTER:
            advice = _READ_ADVICE if doing.stage == "read" else _ADVICE.get(code or 0, _OTHER_ADVICE)
            raise DataError(f"{what}, as {self._losses[task] - 1} before it over the same batch: {advice}")
        log.warning("%s: it is replaced, and what it was at is made again", what)


_READ_ADVICE = (
    "the storage of the shards does not answer; look at the file system, or raise data.read_seconds"
)
_OTHER_ADVICE = "its last words are above; with data.workers=0 the same happens in the rank itself"
_ADVICE = {
    -signal.SIGKILL: "most likely the machine ran out of memory: lower data.workers, data.prefetch or the "
    "mixture, or raise train.accumulation",
    -signal.SIGBUS: "a file that it had mapped was cut short, or there was no memory for its pages: do not "
    "change shards while a run reads them; lower data.workers and data.prefetch",
}


def _ending(code: int | None) -> str:
    if code is None:
        return "nothing yet, the kernel does not let go of it,"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


_pools: weakref.WeakSet[_Pooled[Any]] = weakref.WeakSet()


def _end_all() -> None:
    for pool in list(_pools):
        pool.close()


atexit.register(_end_all)  # after multiprocessing's own hook, which torch has imported, hence run before it
