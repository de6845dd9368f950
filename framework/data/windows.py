"""Which shards a node needs when: the plan's future, from its lanes and blocks alone.

Inside a block the order of samples is random, so a shard counts as needed during all steps of every block in
which one of the node's lanes reads from it. Nothing is read, and no step is listed: the cost is that of
shards and blocks, whatever the number of samples.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framework.data.plan import EpochLayout, Plan
from framework.world import World

__all__ = ["Spans", "epoch_spans", "node_rows", "peak_bytes", "simulate_fetches", "spans_between"]

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """Stretches of steps in which shards are needed; one row each, all int64 of the same length."""

    shard: Integers
    first: Integers  # the first step
    last: Integers  # the last step, included

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, chosen: NDArray[np.bool_] | Integers) -> Spans:
        return Spans(self.shard[chosen], self.first[chosen], self.last[chosen])

    def merged(self) -> Spans:
        """The same stretches, where those of a shard that overlap or touch are one; sorted by first step."""
        if not len(self):
            return self
        order = np.lexsort((self.first, self.shard))
        shard, first, last = self.shard[order], self.first[order], self.last[order]
        base = int(first.min())
        above = int(last.max()) - base + 2
        # the furthest last step so far of the same shard: a running maximum that each shard lifts anew
        reach = (
            np.maximum.accumulate((shard - shard[0]) * above + last - base)
            - (shard - shard[0]) * above
            + base
        )
        begins = np.ones(len(shard), bool)
        begins[1:] = (shard[1:] != shard[:-1]) | (first[1:] > reach[:-1] + 1)
        starts = np.flatnonzero(begins)
        ends = np.append(starts[1:], len(shard)) - 1
        result = Spans(shard[starts], first[starts], reach[ends])
        return result[np.argsort(result.first, kind="stable")]


def node_rows(count: int, world: World) -> tuple[int, int]:
    """Rows first … last-1 of a step of `count` samples that the ranks of this node take.

    Ranks are numbered node by node, which is how torchrun and srun's block distribution do it.
    """
    first = world.rank - world.local_rank
    last = min(world.size, first + world.local_size)
    return first * count // world.size, last * count // world.size


def epoch_spans(layout: EpochLayout, epoch: int, rows: tuple[int, int]) -> Spans:
    """The stretches of one epoch of a source, for rows first … last-1 of every step; steps are global."""
    total, count, block = layout.total, layout.lanes, layout.block
    lanes = np.arange(min(count, total), dtype=np.int64)
    row = (epoch * total + lanes) % count
    lanes = lanes[(row >= rows[0]) & (row < rows[1])]
    quotient, remainder = divmod(total, count)
    begin = lanes * quotient + np.minimum(lanes, remainder)
    length = quotient + (lanes < remainder)
    blocks = -(-length // block)
    # one entry for each block of each lane
    lane = np.repeat(np.arange(len(lanes)), blocks)
    number = np.arange(len(lane)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    place = begin[lane] + number * block
    size = np.minimum(block, length[lane] - number * block)
    start_step = (epoch * total + lanes[lane]) // count + number * block
    return _over_shards(layout, place, size, start_step)


def _over_shards(layout: EpochLayout, place: Integers, size: Integers, step: Integers) -> Spans:
    """The shards under each stretch of `size` places of the sequence, which wraps round at its end."""
    total = layout.total
    place = (place + layout.rotation) % total
    over = np.maximum(0, place + size - total)  # what lies behind the end, hence at the start
    wraps = over > 0
    begin = np.concatenate([place, np.zeros(int(wraps.sum()), np.int64)])
    end = np.concatenate([place + size - over, over[wraps]])
    first_step = np.concatenate([step, step[wraps]])
    last_step = first_step + np.concatenate([size, size[wraps]]) - 1
    low = np.searchsorted(layout.start, begin, side="right") - 1
    high = np.searchsorted(layout.start, end - 1, side="right") - 1
    counts = high - low + 1
    entry = np.repeat(np.arange(len(low)), counts)
    slot = low[entry] + np.arange(len(entry)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Spans(layout.shards[slot], first_step[entry], last_step[entry])


def spans_between(plan: Plan, name: str, rows: tuple[int, int], start: int, stop: int) -> Spans:
    """The stretches of a source in the steps start … stop-1, cut to them."""
    count, total = plan.counts[name], plan.total(name)
    first = start * count // total
    last = max(first, ((stop * count) - 1) // total)
    parts = [epoch_spans(plan.layout(name, epoch), epoch, rows) for epoch in range(first, last + 1)]
    spans = Spans(
        np.concatenate([part.shard for part in parts]),
        np.concatenate([part.first for part in parts]),
        np.concatenate([part.last for part in parts]),
    )
    spans = spans[(spans.last >= start) & (spans.first < stop)]
    return Spans(spans.shard, np.maximum(spans.first, start), np.minimum(spans.last, stop - 1))


def peak_bytes(spans: Mapping[str, Spans], sizes: Mapping[str, Integers], ahead: int) -> int:
    """The most bytes of shards needed at one step, if each is there `ahead` steps before its time."""
    steps, changes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for name, given in spans.items():
        early = Spans(given.shard, given.first - ahead, given.last).merged()
        bytes_ = sizes[name][early.shard]
        steps += [early.first, early.last + 1]
        changes += [bytes_, -bytes_]
    step, change = np.concatenate(steps), np.concatenate(changes)
    order = np.lexsort((change, step))  # what goes at a step goes before what comes
    return int(np.max(np.cumsum(change[order]), initial=0))


def simulate_fetches(spans: Mapping[str, Spans], sizes: Mapping[str, Integers], limit: int) -> int:
    """Bytes that a node fetches for these stretches into an empty cache of `limit` bytes.

    What is needed last makes room, as in `framework.data.cache`; what is in use stays, whatever the limit.
    """
    uses = sorted(
        (int(first), int(last), (name, int(shard)))
        for name, given in spans.items()
        for merged in [given.merged()]
        for shard, first, last in zip(merged.shard, merged.first, merged.last, strict=True)
    )
    next_first: dict[tuple[str, int], float] = {}
    following = [0.0] * len(uses)
    for place in range(len(uses) - 1, -1, -1):
        following[place] = next_first.get(uses[place][2], math.inf)
        next_first[uses[place][2]] = uses[place][0]
    in_use: list[tuple[int, int]] = []  # heap of (last step, place in uses)
    idle: dict[tuple[str, int], float] = {}
    latest: list[tuple[float, tuple[str, int]]] = []  # heap of the idle ones; those needed last come first
    used = fetched = 0
    for place, (first, last, shard) in enumerate(uses):
        while in_use and in_use[0][0] < first:
            done = heapq.heappop(in_use)[1]
            idle[uses[done][2]] = following[done]
            heapq.heappush(latest, (-following[done], uses[done][2]))
        if idle.pop(shard, None) is None:
            fetched += int(sizes[shard[0]][shard[1]])
            used += int(sizes[shard[0]][shard[1]])
        heapq.heappush(in_use, (last, place))
        while used > limit and latest:
            next_use, other = heapq.heappop(latest)
            if idle.get(other) == -next_use:
                del idle[other]
                used -= int(sizes[other[0]][other[1]])
    return fetched
