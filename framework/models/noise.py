"""Random regularisation without random state: a draw is a hash of a sample's seed and of where it is used.

The draws of a sample depend on nothing but its own seed, so they are the same on any number of ranks, in any
micro-batch, after a resume, and when activation checkpointing computes a block a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["depth_scales", "dropout", "dropout_seeds", "mix", "split_places"]

Groups = Sequence[tuple[int, int]]

BRANCHES = 2  # the attention and the MLP of a block
# Different uses of one seed must not share draws, so each use starts its counters at its own place.
DEPTH_COUNTER, TOKEN_COUNTER, DROPOUT_COUNTER, MASK_COUNTER = 1 << 40, 2 << 40, 3 << 40, 4 << 40


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
FACTORS_64 = (_signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64))
GOLDEN_32 = _signed(0x9E3779B9, 32)
FACTORS_32 = (_signed(0x7FEB352D, 32), _signed(0x846CA68B, 32))


def mix(values: Tensor) -> Tensor:
    """Scramble int64 values one to one (the finaliser of splitmix64, in wrapping arithmetic)."""
    values = values + GOLDEN_64
    values = (values ^ _shift_right(values, 30, 64)) * FACTORS_64[0]
    values = (values ^ _shift_right(values, 27, 64)) * FACTORS_64[1]
    return values ^ _shift_right(values, 31, 64)


def _shift_right(values: Tensor, places: int, bits: int) -> Tensor:
    """Shift as if unsigned: torch's own shift copies the sign bit."""
    return (values >> places) & ((1 << (bits - places)) - 1)


def depth_scales(
    seeds: Tensor,
    groups: Groups,
    layers: int,
    rate: float,
    dtype: torch.dtype,
    *,
    branches: int = BRANCHES,
    first: int = 0,
) -> Tensor:
    """Factors that stochastic depth puts on the branches of all layers.

    The rate grows linearly from 0 at the first layer to `rate` at the last; all branches of a block are
    drawn independently. A kept branch is scaled by 1 / (1 - rate of the layer), a dropped one is 0.

    Args:
        seeds: int64 (samples,), the samples of all groups in order.
        groups: (samples, tokens of a sample) of each group.
        branches: of a block.
        first: how many branches of the same samples have drawn before, in another encoder.

    Returns:
        (layers, branches, total_tokens, 1): the same factor for all tokens of a sample.
    """
    counters = torch.arange(layers * branches, device=seeds.device) + (DEPTH_COUNTER + first)
    draws = mix(seeds ^ mix(counters).unsqueeze(1)).view(layers, branches, -1)
    uniform = _shift_right(draws, 40, 64).to(torch.float32) * 2.0**-24
    rates = torch.linspace(0.0, rate, layers, device=seeds.device).view(-1, 1, 1)
    scales = (uniform >= rates) / (1 - rates)
    return _over_tokens(scales.to(dtype), groups).unsqueeze(-1)


def dropout_seeds(seeds: Tensor, groups: Groups, layers: int) -> Tensor:
    """Seeds of every token for `dropout`: row 0 for the embedding, row 1 + 2 * layer + branch for blocks.

    Args:
        seeds: int64 (samples,), the samples of all groups in order.
        groups: (samples, tokens of a sample) of each group.

    Returns:
        int32 (1 + 2 * layers, total_tokens).
    """
    places = [torch.arange(tokens, device=seeds.device).repeat(samples) for samples, tokens in groups]
    tokens = mix(_over_tokens(seeds, groups) ^ mix(torch.cat(places) + TOKEN_COUNTER))
    counters = torch.arange(1 + layers * BRANCHES, device=seeds.device) + DROPOUT_COUNTER
    return mix(tokens ^ mix(counters).unsqueeze(1)).to(torch.int32)


def dropout(values: Tensor, seeds: Tensor, rate: float) -> Tensor:
    """Set elements to 0 with probability `rate` and scale the others by 1 / (1 - rate).

    Args:
        values: (tokens, width).
        seeds: int32 (tokens,), one row of `dropout_seeds`.
    """
    channels = torch.arange(values.shape[-1], device=values.device, dtype=torch.int32) * GOLDEN_32
    draws = seeds.unsqueeze(-1) + channels
    draws = (draws ^ _shift_right(draws, 16, 32)) * FACTORS_32[0]
    draws = (draws ^ _shift_right(draws, 15, 32)) * FACTORS_32[1]
    draws = draws ^ _shift_right(draws, 16, 32)
    kept = (draws & 0xFFFFFF) >= int(rate * 2**24)
    return values * kept * (1 / (1 - rate))


def split_places(seeds: Tensor, places: int, masked: int) -> tuple[Tensor, Tensor]:
    """Choose places at random for each sample, all choices being alike.

    Args:
        seeds: int64 (samples,).
        places: how many there are.
        masked: how many are chosen.

    Returns:
        The places that are left, int64 (samples, places - masked), and those that are chosen, int64
        (samples, masked); both in their order.
    """
    counters = torch.arange(places, device=seeds.device) + MASK_COUNTER
    order = mix(seeds.unsqueeze(1) ^ mix(counters)).argsort(dim=1)
    return order[:, masked:].sort(dim=1).values, order[:, :masked].sort(dim=1).values


def _over_tokens(values: Tensor, groups: Groups) -> Tensor:
    """Repeat values of samples, (…, samples), for each of their tokens: (…, total_tokens)."""
    parts = values.split([samples for samples, _ in groups], dim=-1)
    spread = [
        part.unsqueeze(-1).expand(*part.shape, tokens).flatten(-2)
        for part, (_, tokens) in zip(parts, groups, strict=True)
    ]
    return torch.cat(spread, dim=-1)
