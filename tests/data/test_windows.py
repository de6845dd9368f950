"""Promises about the plan's future: it names every shard of every step, and no more than a block needs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.data.plan import Plan, PlanSource
from framework.data.windows import Spans, node_rows, peak_bytes, simulate_fetches, spans_between
from framework.world import World


def shards_of(sizes: list[int], indices: np.ndarray) -> set[int]:
    ends = np.cumsum(sizes)
    return set(np.searchsorted(ends, indices, side="right").tolist())


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0),
    per_rank=st.integers(1, 4),
    ranks=st.integers(1, 6),
    local=st.integers(1, 3),
    block=st.integers(1, 12),
    start=st.integers(0, 30),
    length=st.integers(1, 12),
)
def test_every_shard_of_every_step_is_known_before(
    sizes: list[int], per_rank: int, ranks: int, local: int, block: int, start: int, length: int
) -> None:
    plan = Plan([PlanSource("a", per_rank * ranks, np.array(sizes), "x")], seed=3, block=block)
    for first in range(0, ranks, local):
        rows = node_rows(per_rank * ranks, World(first, ranks, 0, local))
        spans = spans_between(plan, "a", rows, start, start + length)
        for step in range(start, start + length):
            used: set[int] = set()
            for rank in range(first, min(first + local, ranks)):
                share = plan.share(step, rank=rank, world=ranks, micro=0, accumulation=1)["a"]
                used |= shards_of(sizes, share.index)
            known = spans.shard[(spans.first <= step) & (step <= spans.last)]
            assert used <= set(known.tolist())


def test_a_span_is_no_longer_than_the_blocks_that_need_it() -> None:
    """With blocks of one sample nothing is uncertain: the spans are the steps of use."""
    sizes = [5, 3, 7, 4, 6]
    plan = Plan([PlanSource("a", 4, np.array(sizes), "x")], seed=1, block=1)
    spans = spans_between(plan, "a", (0, 4), 0, 12)
    used = {(step, shard) for step in range(12) for shard in shards_of(sizes, plan.step(step)["a"].index)}
    told = {
        (step, int(shard))
        for shard, first, last in zip(spans.shard, spans.first, spans.last, strict=True)
        for step in range(first, last + 1)
    }
    assert told == used


def test_stretches_that_touch_become_one() -> None:
    spans = Spans(np.array([1, 0, 1, 1, 0]), np.array([0, 5, 3, 9, 0]), np.array([8, 6, 4, 9, 3]))
    merged = spans.merged()
    assert list(zip(merged.shard.tolist(), merged.first.tolist(), merged.last.tolist(), strict=True)) == [
        (0, 0, 3),
        (1, 0, 9),
        (0, 5, 6),
    ]


def test_the_peak_counts_a_shared_shard_once() -> None:
    spans = {"a": Spans(np.array([0, 0, 1]), np.array([0, 2, 4]), np.array([3, 4, 6]))}
    sizes = {"a": np.array([100, 10])}
    assert peak_bytes(spans, sizes, ahead=0) == 110
    assert peak_bytes({"a": spans["a"][np.array([0, 1])]}, sizes, ahead=0) == 100


@pytest.mark.parametrize(("limit", "fetched"), [(30, 30), (20, 40), (10, 50)])
def test_fetches_by_the_size_of_the_cache(limit: int, fetched: int) -> None:
    """Shards of 10 bytes used in the order 0 1 2 0 1: who keeps what comes next fetches less."""
    spans = {"a": Spans(np.array([0, 1, 2, 0, 1]), np.arange(5), np.arange(5))}
    assert simulate_fetches(spans, {"a": np.array([10, 10, 10])}, limit) == fetched


def test_a_large_plan_is_looked_through_at_once() -> None:
    """A hundred thousand shards of a thousand million samples: the future of a node costs its shards."""
    sizes = np.full(100_000, 10_000)
    plan = Plan([PlanSource("a", 4096, sizes, "x")], seed=0, block=1024)
    spans = spans_between(plan, "a", node_rows(4096, World(8, 512, 0, 8)), 1000, 200_000)
    share = plan.share(5000, rank=9, world=512, micro=0, accumulation=1)["a"]
    assert set((share.index // 10_000).tolist()) <= set(
        spans.shard[(spans.first <= 5000) & (spans.last >= 5000)].tolist()
    )
    assert len(spans) < 20_000
