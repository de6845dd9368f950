"""The transformer block, working on the concatenated tokens of groups of different lengths.

A micro-batch is a matrix (total_tokens, width): the tokens of all samples of all groups, one after the other.
`Groups` says how it is made up. Norms, projections and MLPs run on the whole matrix; only attention looks at
the groups. Nothing is padded and nothing is masked.

Every module initialises its own parameters in its own constructor, and nobody reads a parameter of another
module: under ZeRO-3 parameters are only there while the module that owns them is at work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.models.noise import dropout as drop_elements
from framework.recipe.schema import Gelu

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "FusedLinear",
    "Groups",
    "Head",
    "LayerNorm",
    "Linear",
    "add",
    "divide",
    "join",
    "matrix",
    "rows",
]

Groups = tuple[tuple[int, int], ...]
"""(samples, tokens of a sample) of each group, in the order of the rows of the token matrix."""


def rows(groups: Groups) -> list[int]:
    """How many rows of the token matrix each group has."""
    return [samples * tokens for samples, tokens in groups]


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis, without a copy when there is only one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def matrix(parts: Sequence[Tensor]) -> tuple[Tensor, Groups]:
    """The token matrix of parts (samples, tokens, width), and its groups."""
    groups = tuple((part.shape[0], part.shape[1]) for part in parts)
    return join([part.flatten(0, 1) for part in parts]), groups


def divide(tokens: Tensor, groups: Groups) -> Sequence[Tensor]:
    """The rows of each group, without a copy of the gradients when there is only one."""
    return (tokens,) if len(groups) == 1 else tokens.split(rows(groups))


class Linear(nn.Linear):
    """A linear layer with Xavier-uniform weight and zero bias."""

    parts = 1

    def reset_parameters(self) -> None:
        """Initialise each of the `parts` that the output is made of as a layer of its own."""
        for part in self.weight.chunk(self.parts):
            nn.init.xavier_uniform_(part)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class FusedLinear(Linear):
    """Queries, keys and values in one product."""

    parts = 3


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with the epsilon of ViT."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)


class Head(nn.Linear):
    """The classifier of one source: (samples, width) to float32 logits (samples, classes).

    It computes in float32 whatever the parameters are: it is a small product, and bf16 logits would keep only
    8 bits for the loss to tell classes apart.
    """

    def reset_parameters(self) -> None:
        """Small weights: all classes start about equally likely, and gradients flow from the first step."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Logits of pooled samples."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), self.bias.float())


class Attention(nn.Module):
    """Multi-head self-attention inside each sample."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = FusedLinear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        """Attend; tokens (total_tokens, width) to the same shape."""
        parts = divide(self.qkv(tokens), groups)
        attended = [self._attend(part, *group) for part, group in zip(parts, groups, strict=True)]
        return self.proj(join(attended))

    def _attend(self, qkv: Tensor, samples: int, tokens: int) -> Tensor:
        width = qkv.shape[-1] // 3
        qkv = qkv.view(samples, tokens, 3, self.heads, width // self.heads)
        # Cut where they lie and turned afterwards: the backward pass then writes the three gradients side by
        # side as the projection takes them, where turning first would cost one more copy.
        # each (samples, heads, tokens, width / heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(samples * tokens, width)


class MLP(nn.Module):
    """Two linear layers with a GELU between them: the exact one (erf), or its approximation by tanh."""

    def __init__(self, width: int, hidden: int, gelu: Gelu = "exact") -> None:
        super().__init__()
        self.approximate = "none" if gelu == "exact" else gelu
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Work on every token alone; (total_tokens, width) to the same shape."""
        return self.fc2(F.gelu(self.fc1(tokens), approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm transformer block: z = z + attention(norm(z)), then z = z + MLP(norm(z))."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float = 0.0, gelu: Gelu = "exact"
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, hidden, gelu)

    def forward(
        self, tokens: Tensor, groups: Groups, depth: Tensor | None = None, seeds: Tensor | None = None
    ) -> Tensor:
        """Run the block.

        Args:
            tokens: (total_tokens, width).
            groups: what the rows are.
            depth: (2, total_tokens, 1), this layer's part of `noise.depth_scales`; None keeps all branches.
            seeds: int32 (2, total_tokens), this layer's part of `noise.dropout_seeds`; None: no dropout.
        """
        tokens = self._add(tokens, self.attn(self.norm1(tokens), groups), 0, depth, seeds)
        return self._add(tokens, self.mlp(self.norm2(tokens)), 1, depth, seeds)

    def _add(
        self, tokens: Tensor, branch: Tensor, number: int, depth: Tensor | None, seeds: Tensor | None
    ) -> Tensor:
        if seeds is not None:
            branch = drop_elements(branch, seeds[number], self.dropout)
        return add(tokens, branch, None if depth is None else depth[number])


def add(tokens: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """The skip connection: tokens and a branch, which stochastic depth may scale, row by row."""
    return tokens + branch if scale is None else torch.addcmul(tokens, branch, scale)
