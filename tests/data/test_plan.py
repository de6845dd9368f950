"""Promises of the plan: exactly once, the same for every division, pure, and cheap at any size."""

from __future__ import annotations

import itertools
import resource
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.plan import Plan, PlanSource
from framework.errors import DataError, RecipeError

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)


def make_plan(sizes: list[int], count: int, *, seed: int = 0, block: int = 4, name: str = "a") -> Plan:
    source = PlanSource(name, count, np.array(sizes, np.int64), "identity")
    return Plan([source], seed=seed, block=block)


def order_of(plan: Plan, steps: int, name: str = "a") -> tuple[np.ndarray, np.ndarray]:
    parts = [plan.step(step)[name] for step in range(steps)]
    return np.concatenate([p.epoch for p in parts]), np.concatenate([p.index for p in parts])


@settings(max_examples=150, deadline=None)
@given(SHARDS, st.integers(1, 20), st.integers(1, 7), st.integers(0, 5))
def test_every_epoch_has_every_sample_exactly_once(
    sizes: list[int], count: int, block: int, seed: int
) -> None:
    total = sum(sizes)
    plan = make_plan(sizes, count, block=block, seed=seed)
    epoch, index = order_of(plan, -(-3 * total // count))
    assert (np.diff(epoch) >= 0).all()
    for number in range(3):
        assert sorted(index[epoch == number]) == list(range(total))


@settings(max_examples=60, deadline=None)
@given(
    SHARDS,
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 40),
)
def test_shares_are_the_step_cut_in_order(
    sizes: list[int], rows: int, world: int, accumulation: int, step: int
) -> None:
    count = 72 * rows  # divides by every world x accumulation
    whole = make_plan(sizes, count).step(step)["a"]
    plan = make_plan(sizes, count)  # a fresh one: nothing may depend on what was asked before
    shares = [
        plan.share(step, rank=rank, world=world, micro=micro, accumulation=accumulation)["a"]
        for rank in range(world)
        for micro in range(accumulation)
    ]
    assert {len(share.index) for share in shares} == {count // world // accumulation}
    np.testing.assert_array_equal(np.concatenate([s.index for s in shares]), whole.index)
    np.testing.assert_array_equal(np.concatenate([s.epoch for s in shares]), whole.epoch)


@settings(max_examples=40, deadline=None)
@given(SHARDS, st.integers(1, 20), st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_a_step_does_not_depend_on_the_steps_before(sizes: list[int], count: int, steps: list[int]) -> None:
    visited = make_plan(sizes, count)
    for step in steps:
        got = visited.step(step)["a"]
        fresh = make_plan(sizes, count).step(step)["a"]
        np.testing.assert_array_equal(got.index, fresh.index)
        np.testing.assert_array_equal(got.epoch, fresh.epoch)


@pytest.mark.parametrize(("sizes", "count"), [([1], 7), ([2, 0, 1], 512), ([5], 5), ([0, 3], 1)])
def test_sources_smaller_than_a_step_go_through_several_epochs(sizes: list[int], count: int) -> None:
    epoch, index = order_of(make_plan(sizes, count), 3)
    total = sum(sizes)
    np.testing.assert_array_equal(epoch, np.arange(3 * count) // total)
    for number in range(3 * count // total):
        assert sorted(index[epoch == number]) == list(range(total))


def test_seed_epoch_and_source_change_the_order() -> None:
    sizes, count = [40] * 25, 10
    epoch, index = order_of(make_plan(sizes, count), 200)
    first, second = index[epoch == 0], index[epoch == 1]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, order_of(make_plan(sizes, count, seed=1), 100)[1])
    assert not np.array_equal(first, order_of(make_plan(sizes, count, name="b"), 100, "b")[1])


def test_a_small_source_meets_other_samples_each_epoch() -> None:
    """With one shard and two samples a lane, fixed lanes would never let two lane-mates meet in a step."""
    index = order_of(make_plan([16], 8), 120)[1].reshape(120, 8)
    together = {frozenset(pair) for row in index.tolist() for pair in itertools.combinations(row, 2)}
    assert len(together) == 16 * 15 // 2


def test_a_step_mixes_shards_and_a_lane_reads_them_in_order() -> None:
    sizes, count, block = [64] * 64, 32, 16
    plan = make_plan(sizes, count, block=block)
    epoch, index = order_of(plan, 128)
    shard = (index // 64).reshape(128, count)
    assert np.median([len(set(row)) for row in shard]) >= count // 2
    for lane in range(
        count
    ):  # 128 samples of a lane span 2 or 3 shards, each visited in one stretch of blocks
        stretches = 1 + np.count_nonzero(np.diff(shard[:, lane]))
        assert len(set(shard[:, lane])) <= 3
        assert stretches <= 3 + 2 * block
    assert (epoch == 0).all()


def test_order_within_a_block_is_shuffled() -> None:
    index = order_of(make_plan([4096], 4, block=1024), 1024)[1].reshape(1024, 4)
    for lane in range(4):
        correlation = np.corrcoef(np.arange(1024), np.argsort(np.argsort(index[:, lane])))[0, 1]
        assert abs(correlation) < 0.15


def test_billion_samples_in_a_million_shards_need_little_time_and_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = make_plan([1000] * 1_000_000, 4096, block=1024)
    assert plan.steps_per_epoch("a") == pytest.approx(1e9 / 4096)
    plan.share(244_000, rank=3, world=8, micro=0, accumulation=1)
    started = time.perf_counter()
    for step in range(244_001, 244_201):  # crosses the end of epoch 0, so one more shard order is made
        ids = plan.share(step, rank=3, world=8, micro=0, accumulation=1)["a"]
        assert len(np.unique(ids.index)) == 512
        assert 0 <= ids.index.min() <= ids.index.max() < 1_000_000_000
    seconds = (time.perf_counter() - started) / 200
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert seconds < 0.05
    assert grown < 512, f"{grown:.0f} MiB"


def test_billion_samples_repeat_nothing_over_many_steps() -> None:
    plan = make_plan([1000] * 1_000_000, 4096, block=64)
    _, index = order_of(plan, 150)
    assert len(np.unique(index)) == len(index)


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(0, 10), st.integers(0, 3), st.data())
def test_substitutes_are_other_samples_and_fixed(
    sizes: list[int], epoch: int, attempt: int, data: st.DataObject
) -> None:
    total = sum(sizes)
    index = data.draw(st.integers(0, total - 1))
    plan = make_plan(sizes, 3)
    other = plan.substitute("a", epoch, index, attempt)
    assert 0 <= other < total
    assert (other != index) == (total > 1)
    assert other == make_plan(sizes, 3).substitute("a", epoch, index, attempt)


def test_hash_tells_whether_steps_are_the_same() -> None:
    base = make_plan([5, 6], 4).hash
    assert len(base) == 32
    assert make_plan([5, 6], 4).hash == base
    others = [
        make_plan([6, 5], 4),
        make_plan([5, 6], 5),
        make_plan([5, 6], 4, seed=1),
        make_plan([5, 6], 4, block=5),
        make_plan([5, 6], 4, name="b"),
        Plan([PlanSource("a", 4, np.array([5, 6]), "other")], seed=0, block=4),
    ]
    assert len({base, *(plan.hash for plan in others)}) == 7


def test_order_of_sources_does_not_matter() -> None:
    sources = [PlanSource("a", 4, np.array([9]), "x"), PlanSource("b", 2, np.array([7, 7]), "y")]
    one, two = Plan(sources, seed=0, block=4), Plan(sources[::-1], seed=0, block=4)
    assert one.hash == two.hash
    for name in ("a", "b"):
        np.testing.assert_array_equal(one.step(5)[name].index, two.step(5)[name].index)


def test_uneven_mixture_says_which_numbers_work() -> None:
    sources = [PlanSource("k400", 24, np.array([90]), "x"), PlanSource("in1k", 36, np.array([70]), "y")]
    plan = Plan(sources, seed=0, block=4)
    for world, accumulation in ((1, 1), (2, 3), (12, 1), (3, 4)):
        plan.check(world, accumulation)
    with pytest.raises(RecipeError, match="k400: 24") as caught:
        plan.check(9, 1)
    message = str(caught.value)
    assert "in1k" not in message
    assert "numbers of ranks work: 1, 2, 3, 4, 6, 12." in message
    with pytest.raises(RecipeError, match=r"numbers of ranks work: 1, 2\. With 3 rank.* work: 1, 2, 4\."):
        plan.check(3, 6)
    with pytest.raises(RecipeError, match="ranks work: none"):
        plan.share(0, rank=0, world=2, micro=0, accumulation=5)


def test_source_without_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="source a: the manifest holds no samples"):
        make_plan([0, 0], 4)


def test_repeats_change_the_hash_and_no_sample() -> None:
    once, often = (
        Plan([PlanSource("a", 4, np.array([9, 8]), "x", repeats)], seed=1, block=4) for repeats in (1, 3)
    )
    assert once.hash != often.hash
    assert often.counts == {"a": 4}
    for step in range(9):
        assert once.of_step("a", step).index.tolist() == often.of_step("a", step).index.tolist()
