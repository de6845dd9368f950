"""From the tokens of a sample to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.models.layers import Groups, Linear, join, rows

__all__ = ["AttentionPool", "MeanPool"]


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
        scores = nn.functional.linear(tokens, self.query) * width**-0.5  # (total_tokens, heads)
        averages = []
        for part, score, (samples, length) in zip(
            tokens.split(rows(groups)), scores.split(rows(groups)), groups, strict=True
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


class MeanPool(nn.Module):
    """The mean over the tokens of a sample."""

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Pool; (total_tokens, width) to (total_samples, width)."""
        parts = zip(tokens.split(rows(groups)), groups, strict=True)
        return join([part.view(*group, -1).mean(dim=1) for part, group in parts])
