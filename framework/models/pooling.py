"""From the tokens of a sample to one vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.models.layers import MLP, Groups, LayerNorm, Linear, divide, join
from framework.recipe.schema import Pool

__all__ = [
    "AttentionPool",
    "ClassToken",
    "FirstToken",
    "MapPool",
    "MeanPool",
    "ScalarPool",
    "build_pool",
]


def build_pool(name: Pool, width: int, heads: int, mlp_width: int) -> nn.Module:
    """The pooling that a recipe names; `class_token` needs a `ClassToken` before the encoder."""
    if name == "attention":
        return AttentionPool(width, heads)
    if name == "scalar":
        return ScalarPool(width)
    if name == "map":
        return MapPool(width, heads, mlp_width)
    return MeanPool() if name == "mean" else FirstToken()


class AttentionPool(nn.Module):
    """Multi-head attention of one learned query over all tokens (TubeViT figure 2).

    With a single query, its product with the key projection is itself only one vector per head, so that
    vector is what is learned: `query`, (heads, width). In the same way values are projected after the
    average, once per sample and not once per token. It starts as the mean over tokens: queries start at zero.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(heads, width))
        self.value = HeadwiseLinear(width, heads)

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Pool; (total_tokens, width) to (total_samples, width)."""
        width = tokens.shape[-1]
        scores = F.linear(tokens, self.query) * width**-0.5  # (total_tokens, heads)
        averages = []
        for part, score, (samples, length) in zip(
            divide(tokens, groups), divide(scores, groups), groups, strict=True
        ):
            weights = score.view(samples, length, self.heads).softmax(dim=1, dtype=torch.float32)
            values = part.view(samples, length, width)
            averages.append(weights.to(values.dtype).transpose(1, 2) @ values)  # (samples, heads, width)
        return self.value(join(averages))


class HeadwiseLinear(Linear):
    """The value projection: each head has its own average of the tokens and its own slice of the output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, width)
        self.heads = heads

    def forward(self, input: Tensor) -> Tensor:
        """Project averages (samples, heads, width) to (samples, width)."""
        weight = self.weight.view(self.heads, -1, self.in_features)
        projected = torch.einsum("shw,how->sho", input, weight)
        return projected.flatten(1) + self.bias


class ScalarPool(nn.Module):
    """The average over all tokens, weighted with the softmax of one learned score per token.

    It starts as the mean: the score of a token is its product with `query` (width,), which starts at zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Pool; (total_tokens, width) to (total_samples, width)."""
        scores = F.linear(tokens, self.query.unsqueeze(0)) * tokens.shape[-1] ** -0.5
        parts = zip(divide(tokens, groups), divide(scores, groups), groups, strict=True)
        averages = []
        for part, score, (samples, length) in parts:
            weights = score.view(samples, 1, length).softmax(dim=-1, dtype=torch.float32)
            averages.append((weights.to(part.dtype) @ part.view(samples, length, -1)).squeeze(1))
        return join(averages)


class MapPool(nn.Module):
    """Multi-head attention pooling with an MLP after it, as the authors' other vision transformers have it.

    y = attention(query, tokens), then y + MLP(norm(y)); all four projections of the attention are there.
    """

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, width))
        nn.init.xavier_uniform_(self.query)
        self.to_query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.proj = Linear(width, width)
        self.norm = LayerNorm(width)
        self.mlp = MLP(width, mlp_width)

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Pool; (total_tokens, width) to (total_samples, width)."""
        query = self.to_query(self.query)  # (1, width), the same for all samples
        parts = zip(divide(self.key(tokens), groups), divide(self.value(tokens), groups), groups, strict=True)
        attended = self.proj(join([self._attend(query, *part) for part in parts]))
        return attended + self.mlp(self.norm(attended))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, group: tuple[int, int]) -> Tensor:
        shape = (*group, self.heads, key.shape[-1] // self.heads)
        queries = query.view(1, 1, *shape[2:]).expand(group[0], 1, *shape[2:])
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2)
        )
        return attended.flatten(1)  # from (samples, heads, 1, width / heads)


class ClassToken(nn.Module):
    """A learned token, `weight` (width,), that is put before the tokens of every sample.

    It has no place in the clip, and so no position.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor, groups: Groups) -> tuple[Tensor, Groups]:
        """Add the token: the token matrix (total_tokens + total_samples, width), and its groups."""
        longer = []
        for part, (samples, length) in zip(divide(tokens, groups), groups, strict=True):
            first = self.weight.to(part.dtype).expand(samples, 1, -1)
            longer.append(torch.cat((first, part.view(samples, length, -1)), dim=1).flatten(0, 1))
        return join(longer), tuple((samples, length + 1) for samples, length in groups)


class FirstToken(nn.Module):
    """The first token of a sample, the class token."""

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Pool; (total_tokens, width) to (total_samples, width)."""
        parts = zip(divide(tokens, groups), groups, strict=True)
        return join([part.view(*group, -1)[:, 0] for part, group in parts])


class MeanPool(nn.Module):
    """The mean over the tokens of a sample."""

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Pool; (total_tokens, width) to (total_samples, width)."""
        parts = zip(divide(tokens, groups), groups, strict=True)
        return join([part.view(*group, -1).mean(dim=1) for part, group in parts])
