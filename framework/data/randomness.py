"""Counter-based randomness: every draw is a pure function of what it is for.

No generator lives longer than the sample it serves. A draw depends on the run's seed, the source, the
epoch, the sample and the purpose, and on nothing else: not on ranks, workers, prefetch, or where a run was
interrupted. The numbers come from splitmix64 (Steele, Lea, Flood 2014) in plain 64-bit arithmetic, so they
are also the same under every version of numpy and torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draws", "mix", "mix_arrays", "sample_seed", "stream_key"]

Item = TypeVar("Item")
Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def stream_key(*parts: object) -> int:
    """A 64-bit key for a named stream of draws, from any printable parts (blake2b of their repr)."""
    text = "\x1f".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(key: int, *values: int) -> int:
    """Hash a 64-bit key and integers to 64 bits; the scalar twin of `mix_arrays`."""
    for value in values:
        word = (key + _GOLDEN * ((value + 1) & _MASK)) & _MASK
        word = ((word ^ (word >> 30)) * _FIRST) & _MASK
        word = ((word ^ (word >> 27)) * _SECOND) & _MASK
        key = word ^ (word >> 31)
    return key


def mix_arrays(key: int, *values: Any) -> Words:
    """Hash a 64-bit key and integer arrays that broadcast together; returns uint64 of at least one axis.

    Every value may be an integer or an integer array. Equal inputs give what `mix` gives.
    """
    state = np.full(1, key & _MASK, np.uint64)
    for value in values:
        word = np.atleast_1d(np.asarray(value)).astype(
            np.uint64
        )  # a copy: numpy wraps arrays, warns on scalars
        word += np.uint64(1)
        word *= np.uint64(_GOLDEN)
        word = word + state
        word ^= word >> np.uint64(30)
        word *= np.uint64(_FIRST)
        word ^= word >> np.uint64(27)
        word *= np.uint64(_SECOND)
        word ^= word >> np.uint64(31)
        state = word
    return state


def sample_seed(seed: int, source: str, epoch: int, index: int, view: int = 0) -> int:
    """The seed (64 bits, unsigned) of all random decisions about one view of one sample in one epoch."""
    return mix(stream_key("sample", seed, source), epoch, index, view)


class Draws:
    """A short sequence of random numbers for one purpose of one sample.

    Purposes have separate streams, so a new augmentation does not move the crops of an old recipe.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = mix(seed & _MASK, stream_key("purpose", purpose))
        self._count = 0

    def word(self) -> int:
        """The next 64 random bits."""
        self._count += 1
        return mix(self._key, self._count)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)

    def integer(self, count: int) -> int:
        """An integer in [0, count), count > 0; the reduction's bias is below count / 2^64."""
        return (self.word() * count) >> 64

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items, all alike."""
        return items[self.integer(len(items))]

    def permutation(self, count: int) -> list[int]:
        """A random order of 0 … count-1 (Fisher-Yates)."""
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.integer(last + 1)
            order[last], order[other] = order[other], order[last]
        return order
