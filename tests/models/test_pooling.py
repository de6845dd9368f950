"""Pooling: what each kind computes, and that samples and groups do not see each other."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from framework.models.layers import Groups
from framework.models.pooling import ClassToken, MapPool, ScalarPool, build_pool
from framework.recipe.schema import Pool

GROUPS: Groups = ((2, 5), (3, 4))


@pytest.mark.parametrize("name", get_args(Pool))
def test_samples_are_pooled_alone(name: Pool) -> None:
    torch.manual_seed(0)
    pool = build_pool(name, 24, 4, 48)
    for parameter in pool.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(22, 24)
    together = pool(tokens, GROUPS)
    samples = [*tokens[:10].view(2, 5, 24), *tokens[10:].view(3, 4, 24)]
    alone = torch.cat([pool(sample, ((1, len(sample)),)) for sample in samples])
    assert together.shape == (5, 24)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["attention", "scalar"])
def test_one_query_starts_as_the_mean(name: Pool) -> None:
    tokens = torch.randn(22, 24)
    pool = build_pool(name, 24, 4, 48)
    expected = build_pool("mean", 24, 4, 48)(tokens, GROUPS)
    if name == "attention":
        expected = nn.functional.linear(expected, pool.value.weight)
    torch.testing.assert_close(pool(tokens, GROUPS), expected, atol=1e-5, rtol=1e-5)


def test_scalar_scores_are_a_softmax_over_the_tokens_of_a_sample() -> None:
    pool = ScalarPool(16)
    nn.init.normal_(pool.query)
    tokens = torch.randn(6, 16)
    weights = (tokens @ pool.query / 4).softmax(0)
    torch.testing.assert_close(pool(tokens, ((1, 6),))[0], (weights.unsqueeze(1) * tokens).sum(0))


def test_map_is_torch_s_attention_with_one_query_and_an_mlp() -> None:
    torch.manual_seed(0)
    pool, reference = MapPool(24, 4, 48), nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.normal_(std=0.3)
        parts = (pool.to_query, pool.key, pool.value)
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(pool.proj.state_dict())
    tokens = torch.randn(2, 7, 24)
    attended = reference(pool.query.expand(2, 1, 24), tokens, tokens, need_weights=False)[0][:, 0]
    expected = attended + pool.mlp(pool.norm(attended))
    torch.testing.assert_close(pool(tokens.flatten(0, 1), ((2, 7),)), expected, atol=1e-5, rtol=1e-5)


def test_a_class_token_leads_every_sample() -> None:
    tokens, module = torch.randn(22, 24), ClassToken(24)
    longer, groups = module(tokens, GROUPS)
    assert groups == ((2, 6), (3, 5))
    first = build_pool("class_token", 24, 4, 48)(longer, groups)
    assert torch.equal(first, module.weight.expand(5, 24))
    rest = torch.cat(
        [longer[:12].view(2, 6, 24)[:, 1:].flatten(0, 1), longer[12:].view(3, 5, 24)[:, 1:].flatten(0, 1)]
    )
    assert torch.equal(rest, tokens)
