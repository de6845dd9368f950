"""From the plan to batches: what every rank trains and evaluates on, whatever decodes it.

A worker makes whole micro-batches, and the loader hands them out in the plan's order, so neither the number
of workers nor their speed can change a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from framework.data import progress
from framework.data.labels import label_row, new_labels
from framework.data.limits import DECODE_SECONDS, READ_SECONDS
from framework.data.manifest import SampleInfo
from framework.data.plan import Plan
from framework.data.pool import Care, Failure, Items, Lost, in_order, pixel_memory
from framework.data.prefetch import start_prefetching
from framework.data.quarantine import Quarantine, Quarantined
from framework.data.randomness import sample_seed
from framework.data.samples import SampleReader
from framework.data.sources import OpenSource
from framework.errors import CorruptSample, DataError, TubeworksError
from framework.recipe.schema import Recipe
from framework.world import World

__all__ = ["Batch", "EvalBatch", "Group", "TrainingBatches", "evaluation_batches", "training_batches"]

_MAX_SUBSTITUTES = 16
_MAX_ATTEMPTS = 4096  # with those that are known to be out, which cost nothing


@dataclass
class Group:
    """The samples of one source in a micro-batch, each in as many rows, one after another, as it repeats.

    `pixels` lie with channels last in memory (`torch.channels_last_3d`), which is how decoders give them.
    """

    pixels: torch.Tensor  # uint8 (batch, 3, frames, height, width)
    labels: torch.Tensor  # int64 (batch,); multi-label float32 (batch, classes); heads int64 (batch, heads)
    index: torch.Tensor  # int64 (batch,), in the source's selection
    epoch: torch.Tensor  # int64 (batch,)
    planned: torch.Tensor  # int64 (batch,), `index` before any sample was replaced
    seeds: torch.Tensor  # int64 (batch,), the bits of `sample_seed`


@dataclass
class Batch:
    """One micro-batch of one rank.

    `events` lists samples that were replaced: {"source", "epoch", "index", "key", "shard", "offset",
    "reason", "substitute"}; `seconds` is the time its worker spent per stage.
    """

    step: int
    micro: int
    groups: dict[str, Group] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class EvalBatch:
    """Views of some samples of one source; rows with `valid` False only fill up the last batch."""

    pixels: torch.Tensor  # uint8 (batch, views, 3, frames, height, width)
    labels: torch.Tensor  # as of `Group`; 0 where not valid
    index: torch.Tensor  # int64 (batch,), in the source's selection; -1 where not valid
    valid: torch.Tensor  # bool (batch,)


def training_batches(
    recipe: Recipe,
    sources: Mapping[str, OpenSource],
    plan: Plan,
    world: World,
    *,
    start_step: int,
    stop_step: int,
    quarantine: Quarantine | None = None,
) -> TrainingBatches:
    """This rank's micro-batches of steps start_step … stop_step-1, in order.

    Samples of `quarantine` are replaced by their substitutes; the batches keep to it as it grows.

    Errors, also of the iteration:
        RecipeError: the ranks and micro-batches do not divide the mixture.
        CorruptSample: a sample that cannot be used, with data.on_corrupt=stop.
        DataError: nothing but corrupt substitutes, an unreadable shard, or a worker that died.
    """
    accumulation = recipe.train.accumulation
    plan.check(world.size, accumulation)
    quarantine = Quarantine() if quarantine is None else quarantine
    maker = _TrainingBatches(recipe, dict(sources), plan, world, start_step, quarantine)
    return TrainingBatches(maker, max(0, stop_step - start_step) * accumulation, quarantine)


class TrainingBatches(Iterator[Batch]):
    """The micro-batches of a rank, made ahead by workers; `close` (or losing it) ends them.

    No batch leaves it that holds a sample which `quarantine` keeps out of its step, even if a worker had made
    the batch before it was known.
    """

    def __init__(self, maker: _TrainingBatches, count: int, quarantine: Quarantine) -> None:
        self.quarantine = quarantine
        self._maker = maker
        data = maker.recipe.data
        self._making = threading.RLock()  # a thread may take batches ahead of who renews one
        self._told = len(quarantine.entries)
        care = Care(data.decode_seconds, data.read_seconds, maker.told, maker.describe)
        self._prefetcher = start_prefetching(
            maker.recipe, maker.sources, maker.plan, maker.world, maker.start
        )
        self._items = in_order(maker, count, data.workers, data.prefetch, care)

    def __next__(self) -> Batch:
        with self._making:
            before = self._items.transfer_seconds
            batch = self.renewed(next(self._items))
            batch.seconds["transfer"] = self._items.transfer_seconds - before
        if self._prefetcher:
            self._prefetcher.arrived(batch.step)
        return batch

    def renewed(self, batch: Batch) -> Batch:
        """The batch itself, or its like without what has come into quarantine since it was made."""
        for name, group in batch.groups.items():
            if self.quarantine.any_of(name, group.index.tolist(), batch.step):
                with self._making:
                    self._tell_what_is_new()
                    return self._items.redo(self._maker.number(batch))
        return batch

    def worker_memory(self) -> int:
        """Bytes that the largest worker has for itself."""
        return self._items.memory()

    def _tell_what_is_new(self) -> None:
        if self._maker.recipe.data.workers:  # else the maker has this very quarantine
            if new := self.quarantine.entries[self._told :]:
                self._items.tell(new)
            self._told = len(self.quarantine.entries)

    def close(self) -> None:
        """End the workers."""
        self._items.close()
        if self._prefetcher:
            self._prefetcher.close()


class _TrainingBatches:
    """Makes the n-th micro-batch of a rank; called in any order, in any process."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, OpenSource],
        plan: Plan,
        world: World,
        start_step: int,
        quarantine: Quarantine,
    ) -> None:
        self.recipe = recipe
        self._quarantine = quarantine
        self.plan = plan
        self.world = world
        self.start = start_step
        self.sources = sources
        self._readers = {name: SampleReader(opened) for name, opened in sources.items()}
        self._names = list(sources)
        self._lost: dict[tuple[str, int], str] = {}

    def told(self, value: Lost | tuple[Quarantined, ...]) -> None:
        """Take in what the rank or the pool has found out meanwhile; called in the workers."""
        if isinstance(value, Lost):
            self._lost[self._names[value.source], value.index] = value.reason
        else:
            self._quarantine.add(value)

    def describe(self, source: int, index: int) -> str:
        """Which sample it is that a worker reports."""
        return self._readers[self._names[source]].describe(index)

    def number(self, batch: Batch) -> int:
        """Which of all micro-batches this one is."""
        return (batch.step - self.start) * self.recipe.train.accumulation + batch.micro

    def __call__(self, number: int) -> Batch | Failure:
        step, micro = divmod(number, self.recipe.train.accumulation)
        batch = Batch(self.start + step, micro)
        before = self._seconds()
        try:
            shares = self.plan.share(
                batch.step,
                rank=self.world.rank,
                world=self.world.size,
                micro=micro,
                accumulation=self.recipe.train.accumulation,
            )
            for name, ids in shares.items():
                batch.groups[name] = self._group(name, ids.epoch, ids.index, batch)
        except TubeworksError as error:
            return Failure(error)
        batch.seconds = {stage: seconds - before[stage] for stage, seconds in self._seconds().items()}
        return batch

    def _seconds(self) -> dict[str, float]:
        return {
            stage: sum(reader.seconds[stage] for reader in self._readers.values())
            for stage in progress.STAGES
        }

    def _group(self, name: str, epochs: np.ndarray, indices: np.ndarray, batch: Batch) -> Group:
        source = self.recipe.data.sources[name]
        rows, repeats = len(indices) * source.repeats, source.repeats
        pixels = pixel_memory((rows, source.frames, source.size, source.size, 3))
        labels = new_labels(source.targets, rows)
        used, seeds = np.array(indices, np.int64), np.empty(rows, np.uint64)
        for place, epoch in enumerate(epochs):
            own = slice(place * repeats, (place + 1) * repeats)
            info, used[place], seeds[own] = self._sample(
                name, int(epoch), int(indices[place]), batch, pixels[own].numpy()
            )
            labels[own] = label_row(source.targets, info)
            progress.rest()
        epochs, indices, used = (np.repeat(column, repeats) for column in (epochs, indices, used))
        return Group(
            pixels.permute(0, 4, 1, 2, 3),
            labels,
            torch.from_numpy(used),
            torch.from_numpy(np.array(epochs, np.int64)),
            torch.from_numpy(np.array(indices, np.int64)),
            torch.from_numpy(seeds.view(np.int64)),
        )

    def _sample(
        self, name: str, epoch: int, index: int, batch: Batch, out: np.ndarray
    ) -> tuple[SampleInfo, int, list[int]]:
        """Write the views of a sample, or its substitute's, into `out`; its entry, index and views' seeds."""
        repeats = self.recipe.data.sources[name].repeats
        reader, used, corrupt = self._readers[name], index, 0
        for attempt in range(_MAX_ATTEMPTS):
            place: Quarantined | CorruptSample | None = self._quarantine.holding(name, used, batch.step)
            if place is None:
                info = reader.info(used)
                views = range(attempt * repeats, (attempt + 1) * repeats)
                seeds = [sample_seed(self.recipe.seed, name, epoch, used, view) for view in views]
                progress.begin_sample(self._names.index(name), used)
                try:
                    if reason := self._lost.get((name, used)):
                        raise reader.corrupt(info, reason)
                    reader.training_views(info, seeds, out)
                    return info, used, seeds
                except CorruptSample as error:
                    if self.recipe.data.on_corrupt == "stop":
                        raise
                    place, corrupt = error, corrupt + 1
            replaced, used = used, self.plan.substitute(name, epoch, index, attempt)
            batch.events.append(
                {
                    "source": name,
                    "epoch": epoch,
                    "index": replaced,
                    "key": place.key,
                    "shard": place.shard,
                    "offset": place.offset,
                    "reason": place.reason,
                    "substitute": used,
                }
            )
            if corrupt > _MAX_SUBSTITUTES:
                break
        raise DataError(
            f"source {name}: sample {index} of epoch {epoch} and all of its {_MAX_SUBSTITUTES} substitutes "
            f"are corrupt, the last: {batch.events[-1]['reason']}: run `tubeworks data verify` on "
            f"{self.sources[name].manifest.folder}"
        )


def evaluation_batches(
    source: OpenSource,
    world: World,
    *,
    temporal_views: int,
    spatial_views: int,
    batch: int,
    workers: int,
    shuffle_frames: bool = False,
) -> Items[EvalBatch]:
    """This rank's share of a source: every sample exactly once over all ranks.

    Every rank yields the same number of batches of the same size, so collective calls stay in step. An image
    has one view; a video temporal_views x spatial_views, temporal slowest. `shuffle_frames` permutes the
    frames of every clip by a seed of its sample, which shows whether a model reads time.

    Errors:
        CorruptSample: a sample that cannot be used; held-out data is never substituted.
        DataError: an unreadable shard, or a worker that died.
    """
    maker = _EvaluationBatches(source, world, (temporal_views, spatial_views), batch, shuffle_frames)
    care = Care(DECODE_SECONDS, READ_SECONDS, maker.told, maker.describe)
    count = -(-len(source) // (world.size * batch))
    return in_order(maker, count, workers, 1, care)  # with all views a batch is large


class _EvaluationBatches:
    """Makes the n-th evaluation batch of a rank."""

    def __init__(
        self, opened: OpenSource, world: World, views: tuple[int, int], batch: int, shuffle_frames: bool
    ) -> None:
        self._opened = opened
        self._reader = SampleReader(opened)
        self.world = world
        self._temporal, self._spatial = views if opened.source.kind == "video" else (1, 1)
        self._batch = batch
        self._shuffle = shuffle_frames
        self._lost: dict[int, str] = {}

    def told(self, value: Lost) -> None:
        """Workers are lost over a sample."""
        self._lost[value.index] = value.reason

    def describe(self, _: int, index: int) -> str:
        """Which sample it is that a worker reports."""
        return self._reader.describe(index)

    def __call__(self, number: int) -> EvalBatch | Failure:
        source, rows = self._opened.source, self._batch
        first = (number * self.world.size + self.world.rank) * rows
        index = np.arange(first, first + rows)
        valid = index < len(self._opened)
        shape = (rows, self._temporal * self._spatial, source.frames, source.size, source.size, 3)
        labels = new_labels(source.targets, rows)
        try:
            pixels = pixel_memory(shape)
            pixels[torch.from_numpy(~valid)] = 0
            for row in np.flatnonzero(valid):
                info = self._reader.info(int(index[row]))
                progress.begin_sample(0, int(index[row]))
                if reason := self._lost.get(int(index[row])):
                    raise self._reader.corrupt(info, reason)
                seed = sample_seed(0, self._opened.name, 0, int(index[row])) if self._shuffle else None
                self._reader.evaluation_views(
                    info, self._temporal, self._spatial, shuffle_seed=seed, out=pixels[row].numpy()
                )
                labels[row] = label_row(source.targets, info)
                progress.rest()
        except TubeworksError as error:
            return Failure(error)
        return EvalBatch(
            pixels.permute(0, 1, 5, 2, 3, 4),
            labels,
            torch.from_numpy(np.where(valid, index, -1)),
            torch.from_numpy(valid),
        )
