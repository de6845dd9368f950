"""Promises of the shuffle score: 1 for what is mixed, near 0 for what is not."""

from __future__ import annotations

import numpy as np

from framework.data.plan import Plan, PlanSource
from framework.data.shuffling import shuffle_score


def plan_of(count: int, block: int, shard: int) -> Plan:
    return Plan([PlanSource("a", count, np.full(20_000 // shard, shard), "x")], seed=3, block=block)


def test_single_samples_a_shard_are_a_random_order_and_one_shard_is_the_sorted_one() -> None:
    random = shuffle_score(plan_of(16, 64, shard=1), "a", 20_000, classes=20)
    assert all(score > 0.7 for score in random.values())
    narrow = shuffle_score(plan_of(2, 1, shard=20_000), "a", 20_000, classes=20)
    assert narrow[64] < 0.05


def test_more_lanes_and_longer_blocks_mix_better() -> None:
    few = shuffle_score(plan_of(4, 16, shard=500), "a", 20_000, classes=20)
    many = shuffle_score(plan_of(64, 16, shard=500), "a", 20_000, classes=20)
    assert many[64] > 2 * few[64]
    short = shuffle_score(plan_of(16, 4, shard=500), "a", 20_000, classes=200)
    long = shuffle_score(plan_of(16, 1024, shard=500), "a", 20_000, classes=200)
    assert long[8] > short[8]
