"""Promises of the counter-based draws: pure, equal in scalar and vector form, without visible structure."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from framework.data.randomness import Draws, mix, mix_arrays, sample_seed

WORDS = st.integers(0, 2**64 - 1)


@given(WORDS, st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_scalar_and_vector_hash_agree(key: int, values: list[int]) -> None:
    assert mix(key, *values) == int(mix_arrays(key, *values)[0])


def test_splitmix64_is_the_published_one() -> None:
    # First outputs of splitmix64 seeded with 1234567, as Rosetta Code lists them.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    golden = 0x9E3779B97F4A7C15
    assert [mix((1234567 + golden * count) % 2**64, 0) for count in range(3)] == expected


def test_sample_seeds_are_pure_and_distinct() -> None:
    def seeds(seed: int, source: str) -> list[int]:
        return [sample_seed(seed, source, epoch, index) for epoch in range(4) for index in range(5000)]

    mine = seeds(3, "k400")
    assert mine == seeds(3, "k400")
    assert len(set(mine)) == len(mine)
    for other in (seeds(4, "k400"), seeds(3, "in1k")):
        assert not set(other) & set(mine)


@given(WORDS)
def test_draws_repeat_and_purposes_differ(seed: int) -> None:
    first, again, other = Draws(seed, "crop"), Draws(seed, "crop"), Draws(seed, "flip")
    words = [first.word() for _ in range(4)]
    assert words == [again.word() for _ in range(4)]
    assert words != [other.word() for _ in range(4)]


@given(WORDS, st.integers(1, 200))
def test_draws_stay_in_range(seed: int, count: int) -> None:
    draws = Draws(seed, "range")
    assert 0 <= draws.integer(count) < count
    assert 2.0 <= draws.uniform(2.0, 3.0) < 3.0
    assert sorted(draws.permutation(count)) == list(range(count))


def test_draws_are_uniform() -> None:
    """Chi-square over 20 bins and correlation of neighbours, on seeds that differ in few bits."""
    first = np.array([Draws(seed, "a").uniform() for seed in range(20000)])
    bins = np.histogram(first, 20, (0, 1))[0]
    assert ((bins - 1000.0) ** 2 / 1000.0).sum() < 50  # 19 degrees of freedom: p = 1.4e-4
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03
