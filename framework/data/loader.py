"""From the plan to batches: what every rank trains and evaluates on, whatever decodes it.

A worker makes whole micro-batches, and the loader hands them out in the plan's order, so neither the number
of workers nor their speed can change a batch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from framework.data.plan import Plan
from framework.data.pool import Failure, in_order, pixel_memory
from framework.data.randomness import sample_seed, sample_seeds
from framework.data.samples import STAGES, SampleReader
from framework.data.sources import OpenSource
from framework.errors import CorruptSample, DataError, TubeworksError
from framework.recipe.schema import Recipe
from framework.world import World

__all__ = ["Batch", "EvalBatch", "Group", "evaluation_batches", "training_batches"]

_MAX_SUBSTITUTES = 16


@dataclass
class Group:
    """The samples of one source in a micro-batch.

    `pixels` lie with channels last in memory (`torch.channels_last_3d`), which is how decoders give them.
    """

    pixels: torch.Tensor  # uint8 (batch, 3, frames, height, width)
    labels: torch.Tensor  # int64 (batch,)
    index: torch.Tensor  # int64 (batch,), in the source's selection
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
    labels: torch.Tensor  # int64 (batch,); 0 where not valid
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
) -> Generator[Batch, None, None]:
    """Yield this rank's micro-batches of steps start_step … stop_step-1, in order.

    Close the generator (or leave it to be collected) to end the workers.

    Errors:
        RecipeError: the ranks and micro-batches do not divide the mixture.
        CorruptSample: a sample that cannot be used, with data.on_corrupt=stop.
        DataError: too many of them, an unreadable shard, or a worker that died.
    """
    accumulation = recipe.train.accumulation
    plan.check(world.size, accumulation)
    maker = _TrainingBatches(recipe, dict(sources), plan, world, start_step)
    count = max(0, stop_step - start_step) * accumulation
    return _counting_corrupt(recipe, in_order(maker, count, recipe.data.workers, recipe.data.prefetch))


def _counting_corrupt(recipe: Recipe, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Stop when this rank has replaced more samples than the recipe allows."""
    replaced = 0
    with closing(batches):
        for batch in batches:
            replaced += len(batch.events)
            if replaced > recipe.data.max_corrupt:
                last = batch.events[-1]
                raise DataError(
                    f"{replaced} corrupt samples on this rank, more than data.max_corrupt="
                    f"{recipe.data.max_corrupt}; the last: {last['reason']} (source {last['source']}, shard "
                    f"{last['shard']}, key {last['key']}, offset {last['offset']}): run `tubeworks data "
                    "verify` on the shards and restore what is damaged"
                )
            yield batch


class _TrainingBatches:
    """Makes the n-th micro-batch of a rank; called in any order, in any process."""

    def __init__(
        self, recipe: Recipe, sources: Mapping[str, OpenSource], plan: Plan, world: World, start_step: int
    ) -> None:
        self._recipe = recipe
        self._plan = plan
        self._world = world
        self._start = start_step
        self._sources = sources
        self._readers = {name: SampleReader(opened) for name, opened in sources.items()}

    def __call__(self, number: int) -> Batch | Failure:
        step, micro = divmod(number, self._recipe.train.accumulation)
        batch = Batch(self._start + step, micro)
        before = self._seconds()
        try:
            shares = self._plan.share(
                batch.step,
                rank=self._world.rank,
                world=self._world.size,
                micro=micro,
                accumulation=self._recipe.train.accumulation,
            )
            for name, ids in shares.items():
                batch.groups[name] = self._group(name, ids.epoch, ids.index, batch)
        except TubeworksError as error:
            return Failure(error)
        batch.seconds = {stage: seconds - before[stage] for stage, seconds in self._seconds().items()}
        return batch

    def _seconds(self) -> dict[str, float]:
        return {stage: sum(reader.seconds[stage] for reader in self._readers.values()) for stage in STAGES}

    def _group(self, name: str, epochs: np.ndarray, indices: np.ndarray, batch: Batch) -> Group:
        source = self._recipe.data.sources[name]
        shape = (len(indices), source.frames, source.size, source.size, 3)
        pixels, labels = pixel_memory(shape), np.empty(len(indices), np.int64)
        used, views = np.array(indices, np.int64), np.zeros(len(indices), np.int64)
        for row, epoch in enumerate(epochs):
            view, info, used[row], views[row] = self._sample(
                name, int(epoch), int(indices[row]), batch.events
            )
            started = time.perf_counter()
            pixels[row].numpy()[...] = view
            labels[row] = info.label
            self._readers[name].seconds["collate"] += time.perf_counter() - started
        seeds = sample_seeds(self._recipe.seed, name, epochs, used, views).view(np.int64)
        return Group(
            pixels.permute(0, 4, 1, 2, 3),
            torch.from_numpy(labels),
            torch.from_numpy(used),
            torch.from_numpy(seeds),
        )

    def _sample(self, name: str, epoch: int, index: int, events: list[dict[str, Any]]) -> tuple[Any, ...]:
        """Pixels, manifest entry, index and view number of a sample, or of its substitute."""
        reader, used = self._readers[name], index
        for attempt in range(_MAX_SUBSTITUTES + 1):
            info = reader.info(used)
            try:
                seed = sample_seed(self._recipe.seed, name, epoch, used, attempt)
                return reader.training_view(info, seed), info, used, attempt
            except CorruptSample as error:
                if self._recipe.data.on_corrupt == "stop":
                    raise
                corrupt, used = used, self._plan.substitute(name, epoch, index, attempt)
                events.append(
                    {
                        "source": name,
                        "epoch": epoch,
                        "index": corrupt,
                        "key": error.key,
                        "shard": error.shard,
                        "offset": error.offset,
                        "reason": error.reason,
                        "substitute": used,
                    }
                )
        raise DataError(
            f"source {name}: sample {index} of epoch {epoch} and all of its {_MAX_SUBSTITUTES} substitutes "
            f"are corrupt, the last: {events[-1]['reason']}: run `tubeworks data verify` on "
            f"{self._sources[name].manifest.folder}"
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
) -> Generator[EvalBatch, None, None]:
    """Yield this rank's share of a source: every sample exactly once over all ranks.

    Every rank yields the same number of batches of the same size, so collective calls stay in step. An image
    has one view; a video temporal_views x spatial_views, temporal slowest. `shuffle_frames` permutes the
    frames of every clip by a seed of its sample, which shows whether a model reads time.

    Errors:
        CorruptSample: a sample that cannot be used; held-out data is never substituted.
        DataError: an unreadable shard, or a worker that died.
    """
    maker = _EvaluationBatches(source, world, (temporal_views, spatial_views), batch, shuffle_frames)
    return in_order(
        maker, -(-len(source) // (world.size * batch)), workers, 1
    )  # with all views a batch is large


class _EvaluationBatches:
    """Makes the n-th evaluation batch of a rank."""

    def __init__(
        self, opened: OpenSource, world: World, views: tuple[int, int], batch: int, shuffle_frames: bool
    ) -> None:
        self._opened = opened
        self._reader = SampleReader(opened)
        self._world = world
        self._temporal, self._spatial = views if opened.source.kind == "video" else (1, 1)
        self._batch = batch
        self._shuffle = shuffle_frames

    def __call__(self, number: int) -> EvalBatch | Failure:
        source, rows = self._opened.source, self._batch
        first = (number * self._world.size + self._world.rank) * rows
        index = np.arange(first, first + rows)
        valid = index < len(self._opened)
        shape = (rows, self._temporal * self._spatial, source.frames, source.size, source.size, 3)
        labels = np.zeros(rows, np.int64)
        try:
            pixels = pixel_memory(shape)
            for row in np.flatnonzero(valid):
                info = self._reader.info(int(index[row]))
                seed = sample_seed(0, self._opened.name, 0, int(index[row])) if self._shuffle else None
                pixels[row].numpy()[...] = self._reader.evaluation_views(
                    info, self._temporal, self._spatial, shuffle_seed=seed
                )
                labels[row] = info.label
        except TubeworksError as error:
            return Failure(error)
        return EvalBatch(
            pixels.permute(0, 1, 5, 2, 3, 4),
            torch.from_numpy(labels),
            torch.from_numpy(np.where(valid, index, -1)),
            torch.from_numpy(valid),
        )
