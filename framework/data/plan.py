"""The plan: which samples make up each global step, as a pure function of seed, data and step number.

Nothing else decides order: not ranks, nodes, workers, prefetch, nor where a run was interrupted. The state
of the data is the step number and the plan's hash.

A source of N samples gives `count` = c different samples to every step (each of which the loader makes
`repeats` rows of, which the plan keeps together). The sample at place j of step s has the
global position g = s·c + j; it belongs to epoch e = g // N at position p = g % N. Each epoch orders the N
samples so:

1. shards are permuted by a hash of (seed, source, epoch, shard); the samples of a shard keep their order;
2. the sequence is rotated by a hash of (seed, source, epoch), so that lanes hold other neighbours each epoch;
3. it is cut into c contiguous *lanes* (the first N % c are one longer); a step takes one sample from each
   lane in turn: position p is place p // c of lane p % c;
4. inside a lane, each `block` of consecutive samples is permuted by hashes of (…, lane, block, place).

So every epoch holds every sample exactly once, a rank walks through the shards of its own lanes in order, and
only the shard order of an epoch and the current blocks are ever in memory: N may be billions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framework.data.randomness import mix, mix_arrays, stream_key
from framework.errors import DataError, RecipeError

__all__ = ["EpochLayout", "Plan", "PlanSource", "StepIds", "check_shares"]

Integers = NDArray[np.int64]

_VERSION = 1
_EPOCHS_KEPT = 2
_BLOCK_WORDS_KEPT = 1 << 24  # 64 MiB of permutations of places in blocks


@dataclass(frozen=True)
class PlanSource:
    """What the plan must know of a source.

    `count` samples make one global step, each with `repeats` rows; `shard_sizes` holds the number of this
    source's samples in each shard, in shard order; `identity` is a hash of the manifest and of what was
    selected from it.
    """

    name: str
    count: int
    shard_sizes: Integers
    identity: str
    repeats: int = 1


@dataclass(frozen=True)
class StepIds:
    """The samples of one source in a step, or in a share of it; `index` counts in the source's selection."""

    epoch: Integers  # (count,)
    index: Integers  # (count,)


class _Order(NamedTuple):
    """One epoch's sequence: the permuted shards, and where each of them starts in it."""

    first: Integers  # index of the first sample of each permuted shard
    start: Integers  # place of that sample in the sequence, before rotation
    rotation: int


class EpochLayout(NamedTuple):
    """One epoch's sequence of samples, shards and lanes; see the module's docstring."""

    total: int
    lanes: int
    block: int
    shards: Integers  # numbers of the shards, in the order of the sequence
    start: Integers  # place of the first sample of each in the sequence, before rotation
    rotation: int


class _SourceOrder:
    """The order of one source; see the module's docstring for the mathematics."""

    def __init__(self, source: PlanSource, seed: int, block: int) -> None:
        sizes = np.asarray(source.shard_sizes, dtype=np.int64)
        self.total = int(sizes.sum())
        if self.total <= 0 or bool((sizes < 0).any()):
            raise DataError(f"source {source.name}: the manifest holds no samples to train on")
        if source.count <= 0:
            raise RecipeError(f"source {source.name}: data.mixture must ask for at least one sample a step")
        self._sizes = sizes[sizes > 0]
        self._first = np.cumsum(self._sizes) - self._sizes
        self._shards = np.flatnonzero(sizes > 0)
        self._count = source.count
        self._block = block
        self._keys = {
            name: stream_key(name, seed, source.name) for name in ("shard", "rotate", "block", "other")
        }
        self._orders: OrderedDict[int, _Order] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int, int], NDArray[np.int32]] = OrderedDict()
        self._words = 0

    def ids(self, start: int, stop: int) -> StepIds:
        """The samples at global positions start … stop-1."""
        epochs, indices = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            epoch, position = divmod(start, self.total)
            length = min(stop - start, self.total - position)
            indices.append(self._epoch_indices(epoch, position, position + length))
            epochs.append(np.full(length, epoch, np.int64))
            start += length
        return StepIds(np.concatenate(epochs), np.concatenate(indices))

    def substitute(self, epoch: int, index: int, attempt: int) -> int:
        """Another sample for one that cannot be read; the same sample only if there is no other."""
        if self.total == 1:
            return index
        shift = mix(self._keys["other"], epoch, index, attempt) % (self.total - 1)
        return (index + 1 + shift) % self.total

    def _epoch_indices(self, epoch: int, start: int, stop: int) -> Integers:
        """Samples at positions start … stop-1 of one epoch."""
        places = [np.empty(0, np.int64)]
        while start < stop:
            step, lane = divmod(start, self._count)
            lanes = min(stop - start, self._count - lane)
            places.append(self._places(epoch, step, lane, lane + lanes))
            start += lanes
        return self._lookup(epoch, np.concatenate(places))

    def _places(self, epoch: int, step: int, first: int, last: int) -> Integers:
        """Places in the epoch's sequence that lanes first … last-1 give to their `step`-th turn."""
        lanes = np.arange(first, last, dtype=np.int64)
        quotient, remainder = divmod(self.total, self._count)
        begin = lanes * quotient + np.minimum(lanes, remainder)
        if self.total <= self._count:
            return begin  # every lane holds one sample
        number, column = divmod(step, self._block)
        return begin + number * self._block + self._permuted(epoch, number, first, last)[column]

    def _permuted(self, epoch: int, number: int, first: int, last: int) -> NDArray[np.int32]:
        """Permutations of block `number` of lanes first … last-1: (places of the block, lanes)."""
        key = (epoch, number, first, last)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        quotient, remainder = divmod(self.total, self._count)
        lanes = np.arange(first, last, dtype=np.int64)[:, None]
        longest = quotient + (first < remainder)
        places = np.arange(min(self._block, longest - number * self._block), dtype=np.int64)[None, :]
        words = mix_arrays(self._keys["block"], epoch, number, lanes, places)
        length = quotient + (lanes < remainder) - number * self._block
        # Places behind the end of a shorter lane get the largest key and stay last under a stable sort.
        words[places >= length] = np.iinfo(np.uint64).max
        order = np.ascontiguousarray(np.argsort(words, axis=1, kind="stable").astype(np.int32).T)
        self._words += order.size
        self._blocks[key] = order
        while self._words > _BLOCK_WORDS_KEPT and len(self._blocks) > 1:
            self._words -= self._blocks.popitem(last=False)[1].size
        return order

    def _lookup(self, epoch: int, places: Integers) -> Integers:
        """Indices of the samples at the given places of the epoch's rotated sequence."""
        if len(self._sizes) == 1 and self.total == 1:
            return np.zeros_like(places)
        order = self._order(epoch)
        places = (places + order.rotation) % self.total
        slot = np.searchsorted(order.start, places, side="right") - 1
        return order.first[slot] + places - order.start[slot]

    def layout(self, epoch: int) -> EpochLayout:
        """How an epoch lies over shards and lanes."""
        shards, order = self._permuted_shards(epoch), self._order(epoch)
        return EpochLayout(
            self.total, self._count, self._block, self._shards[shards], order.start, order.rotation
        )

    def _permuted_shards(self, epoch: int) -> Integers:
        return np.argsort(mix_arrays(self._keys["shard"], epoch, self._shards), kind="stable")

    def _order(self, epoch: int) -> _Order:
        """The shard order and rotation of an epoch."""
        if epoch in self._orders:
            return self._orders[epoch]
        shards = self._permuted_shards(epoch)
        sizes = self._sizes[shards]
        rotation = mix(self._keys["rotate"], epoch) % self.total
        order = _Order(self._first[shards], np.cumsum(sizes) - sizes, rotation)
        self._orders[epoch] = order
        while len(self._orders) > _EPOCHS_KEPT:
            self._orders.popitem(last=False)
        return order


class Plan:
    """The samples of every global step.

    Errors:
        DataError: a source without samples.
        RecipeError: a count or block that is not positive, or two sources of the same name.
    """

    def __init__(self, sources: Sequence[PlanSource], *, seed: int, block: int) -> None:
        if block <= 0:
            raise RecipeError(f"data.block is {block}; it must be at least 1")
        self._counts = {source.name: source.count for source in sources}
        self._repeats = {source.name: source.repeats for source in sources}
        if len(self._counts) != len(sources) or not sources:
            raise RecipeError("the plan needs at least one source, and every source once")
        self._orders = {source.name: _SourceOrder(source, seed, block) for source in sources}
        self.hash = _plan_hash(sources, seed, block)
        self.described = {
            source.name: {
                "count": source.count,
                **({"repeats": source.repeats} if source.repeats > 1 else {}),
                "samples": int(np.sum(source.shard_sizes)),
                "shards": len(source.shard_sizes),
                "identity": source.identity,
            }
            for source in sources
        }
        """What the order was made from, by source, for a message about another plan."""

    @property
    def counts(self) -> dict[str, int]:
        """Different samples of each source in one global step."""
        return dict(self._counts)

    def step(self, step: int) -> dict[str, StepIds]:
        """All samples of a global step, per source: (count,) each."""
        return self.share(step, rank=0, world=1, micro=0, accumulation=1)

    def of_step(self, name: str, step: int) -> StepIds:
        """The samples of one source in a global step: (count,)."""
        count = self._counts[name]
        return self._orders[name].ids(step * count, (step + 1) * count)

    def share(self, step: int, *, rank: int, world: int, micro: int, accumulation: int) -> dict[str, StepIds]:
        """The samples of one micro-batch of one rank: a contiguous piece of the step.

        Rank r of W takes rows [r·c/W, (r+1)·c/W), cut into `accumulation` micro-batches in order.

        Errors:
            RecipeError: the counts do not divide by world x accumulation.
        """
        self.check(world, accumulation)
        if not (0 <= rank < world and 0 <= micro < accumulation and step >= 0):
            raise ValueError(f"no share {rank}/{world}, micro-batch {micro}/{accumulation} of step {step}")
        shares = {}
        for name, count in self._counts.items():
            rows = count // (world * accumulation)
            start = step * count + (rank * accumulation + micro) * rows
            shares[name] = self._orders[name].ids(start, start + rows)
        return shares

    def check(self, world: int, accumulation: int) -> None:
        """Raise RecipeError, with the numbers that work, if the ranks cannot share a step evenly."""
        rows = {name: count * self._repeats[name] for name, count in self._counts.items()}
        check_shares(rows, world, accumulation, self._repeats)

    def steps_per_epoch(self, name: str) -> float:
        """How many steps use every sample of a source once; not a whole number in general."""
        return self._orders[name].total / self._counts[name]

    def layout(self, name: str, epoch: int) -> EpochLayout:
        """How an epoch of a source lies over shards and lanes, for those who must know the future."""
        return self._orders[name].layout(epoch)

    def total(self, name: str) -> int:
        """Samples of a source."""
        return self._orders[name].total

    def substitute(self, name: str, epoch: int, index: int, attempt: int) -> int:
        """The sample that replaces a corrupt one, fixed in advance; `attempt` counts failures from 0."""
        return self._orders[name].substitute(epoch, index, attempt)


def check_shares(
    mixture: Mapping[str, int], world: int, accumulation: int, repeats: Mapping[str, int] | None = None
) -> None:
    """Raise RecipeError, with the numbers that work, if ranks cannot share a step of the mixture evenly.

    The `repeats` rows of a sample, 1 where they are not given, stay together in one micro-batch.
    """
    samples = {name: count // (repeats or {}).get(name, 1) for name, count in mixture.items()}
    common = math.gcd(*samples.values())
    if common % (world * accumulation) == 0:
        return
    uneven = [
        _share_in_words(name, mixture[name], count)
        for name, count in samples.items()
        if count % (world * accumulation) != 0
    ]
    ranks = _divisors(common // accumulation) if common % accumulation == 0 else []
    micros = _divisors(common // world) if common % world == 0 else []
    raise RecipeError(
        f"data.mixture cannot be shared by {world} rank(s) x {accumulation} micro-batch(es) a step: "
        f"not divisible by {world * accumulation}: {', '.join(uneven)}. "
        f"With train.accumulation={accumulation} these numbers of ranks work: {_listed(ranks)}. "
        f"With {world} rank(s) these values of train.accumulation work: {_listed(micros)}."
    )


def _share_in_words(name: str, rows: int, samples: int) -> str:
    """What a source gives to a step."""
    if rows == samples:
        return f"{name}: {rows}"
    return f"{name}: {rows} ({samples} samples, each in one piece with its {rows // samples} rows)"


def _plan_hash(sources: Sequence[PlanSource], seed: int, block: int) -> str:
    """A hash of everything that the order depends on; equal hashes mean equal steps for ever."""
    described = {
        source.name: {
            "count": source.count,
            "identity": source.identity,
            **({"repeats": source.repeats} if source.repeats > 1 else {}),
            "shards": hashlib.blake2b(
                np.asarray(source.shard_sizes).astype("<i8").tobytes(), digest_size=16
            ).hexdigest(),
        }
        for source in sources
    }
    text = json.dumps(
        {"version": _VERSION, "seed": seed, "block": block, "sources": described}, sort_keys=True
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _listed(numbers: Sequence[int]) -> str:
    """A few numbers in words; long lists lose their middle."""
    if not numbers:
        return "none"
    if len(numbers) > 16:
        return ", ".join(map(str, numbers[:14])) + f", … {numbers[-1]}"
    return ", ".join(map(str, numbers))
