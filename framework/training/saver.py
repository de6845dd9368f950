"""Saving: every rank writes its share in a thread, rank 0 commits, and training goes on meanwhile.

    start     copy the state to host memory (or, where all wait, only look at it), begin to write
    writing   a thread of every rank writes its files, hashes and syncs them
    commit    once all ranks are done, a thread of rank 0 writes the manifest, renames the folder, prunes
    done      at a later step's end every rank knows that the checkpoint is committed

Threads never talk to other ranks. They only end; the main threads learn of it from two numbers that are
reduced with the flag which is reduced at every step's end anyway, so all ranks decide the same at the same
step. A failure, wherever it happens, ends the run there with its reason.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from framework import files
from framework.errors import CheckpointError, TrainingStopped, TubeworksError
from framework.training.checkpoint_manifest import FIXED, folder_of, read_manifest, write_manifest
from framework.training.distributed import Peers
from framework.training.flight import Flight, Task
from framework.training.host_memory import available_memory
from framework.training.numbers import LOWER_THE_RATE
from framework.training.snapshot import (
    HostCopies,
    Share,
    blocks,
    full_shape,
    is_finite,
    layout,
    share_of,
)
from framework.training.state import TrainState
from framework.training.storage import explain_os_error, make_folder, write_tensors

__all__ = ["Mode", "Saved", "Saver", "save_checkpoint", "tidy"]

log = logging.getLogger(__name__)

Mode = Literal["async", "sync"]

LOOK_SECONDS = 0.5
"""How long a rank that waits for a save goes without hearing from the others."""
SLOW_SECONDS = 60.0
"""After so long the ranks that keep a save waiting are named, and again each time it has passed."""
LEAVE_SECONDS = 10.0
"""How long a thread may take to give up."""
SPARE_SHARE = 0.1
"""Of the memory that is free, what copies must leave."""


class Saved(NamedTuple):
    """A checkpoint that is committed."""

    step: int
    folder: Path
    stall: float
    """Seconds that training stood still for it."""
    seconds: float
    """From its beginning until every rank knew that it is committed."""
    bytes: int


class Saver:
    """Writes the checkpoints of a run, one at a time; all ranks call everything together.

    Args:
        run: the run folder.
        peers: the other ranks.
        mode: `async` copies and lets training go on, `sync` lets it wait.
        prune: what rank 0 does after each commit; its failure is a warning.
        history: what the manifest says of the run as a whole, asked when it is written.
        beat: called while all wait for a save, as long as some rank comes forward with it.
    """

    def __init__(
        self,
        run: Path,
        peers: Peers,
        mode: Mode,
        prune: Callable[[], object] = lambda: None,
        history: Callable[[], Mapping[str, Any]] = dict,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._peers = peers
        self._mode: Mode = mode
        self._prune = prune
        self._history = history
        self._beat = beat
        # Nobody else writes to a folder of this name, so nobody has to wait until it has been emptied.
        self._token = peers.from_main(uuid.uuid4().hex[:8])
        self._copies: HostCopies | None = None
        self._flight: Flight | None = None
        self._task: Task | None = None
        self._news: list[Saved] = []

    def start(
        self,
        step: int,
        model: nn.Module,
        state: TrainState,
        facts: Mapping[str, Any],
        *,
        counters: Any = None,
        wait: bool = False,
    ) -> None:
        """Save the state after a step; returns when it has been copied, or (`wait`, `sync`) is committed.

        A save that is still on its way is waited for first.

        Args:
            step: how many steps are done.
            model: for frozen weights and buffers.
            state: the trainable state that this rank owns.
            facts: what else the manifest records (plan hash, recipe hash, …), from rank 0.
            counters: what this rank counts, as JSON; the manifest keeps that of every rank.
            wait: come back with the checkpoint committed; no copy is made then.

        Errors:
            CheckpointError: on every rank, if any rank could not write; earlier checkpoints are untouched.
            TrainingStopped: what would be saved is not finite.
        """
        self.finish()
        began = time.perf_counter()
        share = share_of(model, state, self._peers.world)
        background = not wait and self._mode == "async" and self._has_room(share)
        if background:
            assert self._copies is not None
            share = self._copies.of(share)
        final = folder_of(self._run, step)
        about = {
            "step": step,
            "optimizer_steps": state.optimizer_steps(),
            "ranks": self._peers.world.size,
            "kinds": state.kinds,
            **facts,
            "shapes": {name: list(full_shape(p)) for name, p in model.named_parameters() if p.requires_grad},
        }
        temporary = final.with_name(f".saving-{final.name}-{self._token}")
        flight = self._flight = Flight(step, temporary, final, share, about, counters, began)
        self._task = Task(lambda: self._write(flight))
        flight.stall = time.perf_counter() - began
        if not background:
            self.finish()

    @property
    def in_flight(self) -> bool:
        """Whether a save is on its way, the same on every rank."""
        return self._flight is not None

    def flags(self) -> list[int]:
        """Whether this rank's thread is busy, and whether it failed: to be reduced by their maximum."""
        if self._task is None:
            return [0, 0]
        busy = self._task.busy  # asked first: a failure is there before the thread ends
        return [int(busy), int(self._task.failure is not None)]

    def advance(self, busy: int, failed: int) -> None:
        """Go on with a save, given the maxima of all ranks' flags.

        Errors:
            CheckpointError, TrainingStopped: as `start`.
        """
        if (flight := self._flight) is not None:
            began = time.perf_counter()
            self._go_on(flight, busy, failed)
            flight.stall += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until nothing is on its way.

        Errors:
            CheckpointError, TrainingStopped: as `start`.
        """
        began = last_told = time.perf_counter()
        pieces = -1
        while (flight := self._flight) is not None:
            assert self._task is not None
            self._task.wait(LOOK_SECONDS)
            now = time.perf_counter()
            flags = self.flags()
            tell = self._peers.world.is_main and now - last_told > SLOW_SECONDS
            busy, failed, tell, far = self._peers.highest([*flags, int(tell), flight.pieces])
            if far > pieces:
                pieces = far
                self._beat()
            if tell and busy:
                last_told = now
                self._name_the_slow(flight.step, flags[0], now - flight.began)
            flight.stall += now - began
            began = now
            self._go_on(flight, busy, failed)

    def take_news(self) -> list[Saved]:
        """The checkpoints that were committed since the last call, the same on every rank."""
        news, self._news = self._news, []
        return news

    def close(self, together: bool) -> None:
        """The run ends with an error: finish what is on its way if all ranks are here, else let go of it."""
        flight = self._flight
        if flight is None:
            return
        if together:
            try:
                self.finish()
                return
            except (TubeworksError, RuntimeError) as error:  # the error that ends the run is on its way
                log.warning("the checkpoint of step %d was not finished: %s", flight.step, error)
        self._give_up(flight)

    # --- in the threads ----------------------------------------------------------------------------------

    def _write(self, flight: Flight) -> None:
        """Write this rank's share (every rank's thread)."""
        make_folder(flight.temporary)
        for name, tensors in flight.share.files.items():
            look = _pass if name == FIXED else self._finite(flight.step, name)
            order = layout(tensors)
            content = blocks(tensors, order, look)
            path = flight.temporary / name
            flight.entries.append(write_tensors(path, order, content, abandoned=flight.abandoned))

    def _finite(self, step: int, file: str) -> Callable[[str, Tensor], None]:
        def look(name: str, tensor: Tensor) -> None:
            if not is_finite(tensor):
                kind = file.rpartition("-")[0]
                raise TrainingStopped(
                    f"weights or moments are not finite after step {step}, so they are not saved ({kind} of "
                    f"{name}, rank {self._peers.world.rank}, was found first): {LOWER_THE_RATE}"
                )

        return look

    def _publish(self, flight: Flight, manifest: dict[str, Any]) -> None:
        """Make the checkpoint count, and let go of old ones (rank 0's thread)."""
        for path in self._run.glob("*.jsonl"):  # what a checkpoint counts as done must not be lost without it
            with explain_os_error(path):
                files.sync_file(path)
        write_manifest(flight.temporary, {**self._history(), **manifest})
        read_manifest(flight.temporary)  # a disk that lies is found while the older checkpoints are there
        with explain_os_error(flight.final):
            if flight.final.exists():  # the same step, saved before training was set back
                _put_aside(flight.final)
            files.disk.rename(flight.temporary, flight.final)
            files.sync_folder(flight.final.parent)
        tidy(self._run)
        try:
            self._prune()
        except TubeworksError as error:
            log.warning("old checkpoints could not be removed, the next save tries again: %s", error)

    # --- in the main threads -----------------------------------------------------------------------------

    def _go_on(self, flight: Flight, busy: int, failed: int) -> None:
        """The next thing to do, which all ranks know from the same numbers."""
        if failed:
            self._raise_failure(flight)
        if not busy and not flight.committing:
            self._commit(flight)
        elif not busy:
            self._flight = self._task = None
            seconds = time.perf_counter() - flight.began
            self._news.append(Saved(flight.step, flight.final, flight.stall, seconds, flight.bytes))

    def _commit(self, flight: Flight) -> None:
        """All ranks have written: put their accounts together, and let rank 0 publish the checkpoint."""
        flight.committing = True
        account = (flight.entries, flight.share.fragments, flight.counters)
        gathered = self._peers.gather(account)
        entries = [entry for share, _, _ in gathered for entry in share]
        flight.bytes = sum(entry["bytes"] for entry in entries)
        flight.share = Share()
        manifest = {
            **flight.about,
            "counters": [counters for _, _, counters in gathered],
            "files": entries,
            "fragments": [piece for _, share, _ in gathered for piece in share],
        }
        if self._peers.world.is_main:
            self._task = Task(lambda: self._publish(flight, manifest))

    def _raise_failure(self, flight: Flight) -> None:
        """A rank has failed: all stop writing, give back the space, and leave with the first reason."""
        failure = self._task.failure if self._task else None
        self._give_up(flight)
        failures = [(rank, error) for rank, error in enumerate(self._peers.gather(failure)) if error]
        if self._peers.world.is_main:  # on a full disk the journal needs it
            files.disk.remove_tree(flight.temporary)
        rank, error = failures[0]
        if isinstance(error, TrainingStopped):
            raise error
        raise CheckpointError(
            f"the checkpoint of step {flight.step} was not written, earlier ones are untouched. "
            f"Rank {rank}: {error}"
        )

    def _give_up(self, flight: Flight) -> None:
        flight.given_up.set()
        if self._task is not None:
            self._task.wait(LEAVE_SECONDS)
        self._flight = self._task = None

    def _name_the_slow(self, step: int, busy: int, seconds: float) -> None:
        slow = [str(rank) for rank, its in enumerate(self._peers.gather(busy)) if its]
        if self._peers.world.is_main and slow:
            log.warning(
                "the checkpoint of step %d is still being written after %.0f s: training waits for rank %s",
                step,
                seconds,
                ", ".join(slow),
            )

    def _has_room(self, share: Share) -> bool:
        """Whether every node has memory for the copies of its ranks; asked once, because they are kept."""
        if self._copies is not None:
            return True
        needed = share.host_bytes * self._peers.world.local_size
        available = available_memory()
        lacks = needed > available * (1 - SPARE_SHARE)
        if self._peers.highest([lacks])[0]:
            self._mode = "sync"
            if lacks:
                log.warning(
                    "copies of the state would take %.1f GiB of host memory and %.1f GiB are free: training "
                    "waits while checkpoints are written, as with checkpoint.mode: sync",
                    needed / 2**30,
                    available / 2**30,
                )
            return False
        self._copies = HostCopies()
        return True


def save_checkpoint(
    run: Path, step: int, model: nn.Module, state: TrainState, peers: Peers, facts: Mapping[str, Any]
) -> Path:
    """Write and commit the checkpoint of a step, all ranks together; returns its folder.

    Errors:
        CheckpointError, TrainingStopped: as `Saver.start`.
    """
    Saver(run, peers, "sync").start(step, model, state, facts)
    return folder_of(run, step)


def tidy(run: Path) -> None:
    """Remove what saves and removals that were cut off have left (rank 0, nothing may be on its way)."""
    for pattern in (".saving-*", ".removing-*"):
        for leftover in (run / "checkpoints").glob(pattern):
            files.disk.remove_tree(leftover)


def _put_aside(folder: Path) -> None:
    """Rename a folder so that it is no checkpoint any more; `tidy` removes it."""
    doomed = folder.with_name(f".removing-{folder.name}")
    with suppress(FileNotFoundError):
        files.disk.remove_tree(doomed)
    files.disk.rename(folder, doomed)


def _pass(_name: str, _tensor: Tensor) -> None:
    """Nothing is asked of what is frozen."""
