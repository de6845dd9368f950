"""Stochastic depth and dropout: right frequencies, and draws that depend on nothing but a sample's seed."""

from __future__ import annotations

import torch

from framework.models.noise import depth_scales, dropout, dropout_seeds, mix

SAMPLES, LAYERS, RATE = 4000, 5, 0.4


def seeds(samples: int = SAMPLES, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + samples)


def splitmix64(value: int) -> int:
    """Steele, Lea and Flood's generator in Python's unbounded integers."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_mix_is_splitmix64() -> None:
    values = [0, 1, -1, 12345678901234567, -(2**63), 2**63 - 1]
    expected = [splitmix64(value & ((1 << 64) - 1)) for value in values]
    assert [value & ((1 << 64) - 1) for value in mix(torch.tensor(values)).tolist()] == expected


def test_depth_rates_grow_linearly_and_keep_the_mean() -> None:
    scales = depth_scales(seeds(), ((SAMPLES, 1),), LAYERS, RATE, torch.float32).squeeze(-1)
    for layer in range(LAYERS):
        rate = RATE * layer / (LAYERS - 1)
        dropped = (scales[layer] == 0).float().mean(dim=1)
        assert (dropped - rate).abs().max() < 0.04
        kept = scales[layer][scales[layer] != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_depth_draws_of_branches_and_layers_are_independent() -> None:
    scales = depth_scales(seeds(), ((SAMPLES, 1),), LAYERS, RATE, torch.float32).squeeze(-1)
    draws = (scales[2:] == 0).float().flatten(0, 1)
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.08


def test_depth_is_one_draw_for_all_tokens_of_a_sample() -> None:
    groups = ((3, 4), (2, 5))
    tokens = depth_scales(seeds(5), groups, LAYERS, RATE, torch.float32).squeeze(-1)
    alone = depth_scales(seeds(5), ((5, 1),), LAYERS, RATE, torch.float32).squeeze(-1)
    expected = torch.cat(
        [alone[..., :3].repeat_interleave(4, dim=-1), alone[..., 3:].repeat_interleave(5, dim=-1)], dim=-1
    )
    assert torch.equal(tokens, expected)


def test_one_layer_keeps_everything() -> None:
    scales = depth_scales(seeds(50), ((50, 2),), 1, 0.9, torch.float32)
    assert torch.equal(scales, torch.ones_like(scales))


def test_dropout_frequency_mean_and_independence() -> None:
    element_seeds = dropout_seeds(seeds(20), ((20, 10),), 1)
    assert element_seeds.shape == (3, 200)
    values = dropout(torch.ones(200, 300), element_seeds[1], 0.25)
    assert abs((values == 0).float().mean().item() - 0.25) < 0.01
    assert abs(values.mean().item() - 1) < 0.02
    assert abs((values == 0).float().mean(dim=0) - 0.25).max() < 0.15
    assert abs((values == 0).float().mean(dim=1) - 0.25).max() < 0.15
    other = dropout(torch.ones(200, 300), element_seeds[2], 0.25)
    together = ((values == 0) & (other == 0)).float().mean().item()
    assert abs(together - 0.25**2) < 0.01


def test_dropout_does_not_depend_on_the_batch() -> None:
    together = dropout_seeds(seeds(6), ((4, 3), (2, 7)), 2)
    second = dropout_seeds(seeds(2, first=4), ((2, 7),), 2)
    assert torch.equal(together[:, 12:], second)
