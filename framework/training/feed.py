"""The data of the next step, agreed between the ranks: all have it, without a corrupt sample, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from framework.data.ledger import append_record, segment_record, start_record
from framework.data.loader import Batch
from framework.data.quarantine import Quarantine, Quarantined, append_quarantine, read_quarantine
from framework.errors import CheckpointError, DataError, TubeworksError
from framework.training.distributed import Peers
from framework.training.session import Session
from framework.training.transfer import copied

__all__ = ["Feed", "agreed_quarantine", "begin_ledger", "commit_ledger"]

log = logging.getLogger(__name__)


def agreed_quarantine(run: Path, peers: Peers, checkpoint: dict[str, Any] | None) -> Quarantine:
    """The quarantine of a run, the same on every rank, after a look at what the checkpoint says of it.

    Errors:
        DataError: the file is damaged.
        CheckpointError: samples that were fed, or were not, before the checkpoint have become others since.
    """
    entries = peers.on_main(lambda: read_quarantine(run).entries)
    quarantine = Quarantine(entries)
    if checkpoint is not None and "quarantine" in checkpoint:
        step = checkpoint["step"]
        if quarantine.digest(step) != checkpoint["quarantine"]:
            raise CheckpointError(
                f"{run}/quarantine.jsonl is not what the checkpoint of step {step} was trained with: lines "
                f"about steps before {step} were added, changed or lost. Restore the file; to take more "
                "samples out, use `tubeworks data quarantine add`"
            )
    return quarantine


def begin_ledger(session: Session, attempt: int) -> None:
    """Write into the run's ledger that an attempt begins (rank 0 only).

    Errors:
        DataError: the file cannot be written.
    """
    sources = {
        name: {"count": count, "total": len(session.sources[name])}
        for name, count in session.plan.counts.items()
    }
    ranks = session.peers.world.size
    append_record(session.run, start_record(session.start, attempt, ranks, session.plan.hash, sources))


def commit_ledger(session: Session, stop: int) -> None:
    """Write down what all ranks were fed up to step `stop`: before a checkpoint of that step is committed.

    Errors:
        DataError: on all ranks, if the file cannot be written.
    """
    shares = session.peers.to_main(session.ledger.take(stop))

    def write() -> None:
        if shares and shares[0]["first"] < stop:
            append_record(session.run, segment_record(shares))

    session.peers.on_main(write)


class Feed:
    """Takes the micro-batches of each step, and puts samples that turn out corrupt into quarantine."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._peers = session.peers
        self._quarantine = session.loader.quarantine
        self._found = 0

    def next_step(self, accumulation: int) -> list[Batch]:
        """The micro-batches of the next step.

        A sample that was corrupt on one rank is out on all of them from this step on, and written down before
        the step is trained: an attempt that replays it feeds the same.

        Errors:
            TubeworksError: on all ranks, if one rank has no data.
            DataError: on all ranks: more corrupt samples over all ranks than data.max_corrupt.
        """
        micro_batches, failure = _attempt(
            lambda: [self._renewed(next(self._session.batches)) for _ in range(accumulation)]
        )
        while True:
            fresh = [] if failure else self._fresh(micro_batches)
            failed, found = self._peers.highest([failure is not None, len(fresh)])
            if failed:
                self._peers.raise_first(failure)
            if not found:
                self._note(micro_batches)
                return micro_batches
            self._put_out([entry for share in self._peers.gather(fresh) for entry in share])
            micro_batches, failure = _attempt(partial(self._all_renewed, micro_batches))

    def _note(self, micro_batches: list[Batch]) -> None:
        """Enter into the ledger what is fed now."""
        rank, accumulation = self._peers.world.rank, len(micro_batches)
        for batch in micro_batches:
            for name, group in batch.groups.items():
                place = (rank * accumulation + batch.micro) * len(group.index)
                columns = (group.epoch.numpy(), group.planned.numpy(), group.index.numpy())
                repeats = self._session.recipe.data.sources[name].repeats
                self._session.ledger.note(batch.step, name, place, *columns, repeats)

    def _all_renewed(self, micro_batches: list[Batch]) -> list[Batch]:
        return [self._renewed(batch) for batch in micro_batches]

    def _renewed(self, batch: Batch) -> Batch:
        """The batch, or its like on the device without what came into quarantine since it was made."""
        again = self._session.loader.renewed(batch)
        return batch if again is batch else copied(again, self._session.device)

    def _fresh(self, micro_batches: list[Batch]) -> list[Quarantined]:
        """Samples of this rank's batches that were found corrupt and are not out yet."""
        return [
            Quarantined(
                source=event["source"],
                index=event["index"],
                key=event["key"],
                shard=event["shard"],
                offset=event["offset"],
                reason=event["reason"],
                from_step=batch.step,
            )
            for batch in micro_batches
            for event in batch.events
            if self._quarantine.holding(event["source"], event["index"], batch.step) is None
        ]

    def _put_out(self, entries: list[Quarantined]) -> None:
        """Write down and take in what all ranks found, once each; the same on every rank."""
        once = list({(entry.source, entry.index): entry for entry in reversed(entries)}.values())[::-1]
        self._peers.on_main(lambda: append_quarantine(self._session.run, once))
        self._quarantine.add(once)
        self._found += len(once)
        if self._peers.world.is_main:
            for entry in once:
                log.warning(
                    "sample %s is replaced from step %d on: %s (source %s, shard %s, offset %d)",
                    entry.key, entry.from_step, entry.reason, entry.source, entry.shard, entry.offset,
                )  # fmt: skip
        if self._found > (limit := self._session.recipe.data.max_corrupt):
            last = once[-1]
            raise DataError(
                f"{self._found} corrupt samples on all ranks, more than data.max_corrupt={limit}"
                f"; the last: {last.reason} (source {last.source}, shard {last.shard}, key {last.key}, "
                f"offset {last.offset}). `tubeworks data quarantine list {self._session.run}` names all: run "
                "`tubeworks data verify` on the shards and restore what is damaged"
            )


def _attempt(work: Callable[[], list[Batch]]) -> tuple[list[Batch], TubeworksError | None]:
    """Do it; an error becomes a value, so that the ranks can agree on it instead of hanging."""
    try:
        return work(), None
    except TubeworksError as error:
        return [], error
