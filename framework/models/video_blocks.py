"""Attention along one axis of a clip, and the blocks that use it.

Tokens lie as in `layers`, in one matrix; those of a sample by time, then height, then width. `Grids` says how
many samples, times and places each group has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.models.layers import MLP, Attention, Block, Groups, LayerNorm, Linear, add, join
from framework.recipe.schema import Gelu

__all__ = [
    "DividedBlock",
    "FactorisedBlock",
    "GridAttention",
    "Grids",
    "SplitBlock",
    "ZeroLinear",
    "by_frame",
]

Grids = tuple[tuple[int, int, int], ...]
"""(samples, times, places of one time) of each group, in the order of the rows of the token matrix."""


def by_frame(grids: Grids, extra: int = 0) -> Groups:
    """The groups in which every time of every sample is by itself, with `extra` tokens each."""
    return tuple((samples * times, places + extra) for samples, times, places in grids)


class ZeroLinear(Linear):
    """A linear layer that starts at zero: what it is the end of changes nothing at first."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class GridAttention(Attention):
    """Self-attention in which some heads see the tokens of one place, the others those of one time.

    The first `temporal_heads` heads attend along time. With all heads it is the temporal attention of ViViT's
    model 3 (arXiv 2103.15691, §3.3), with half of them the factorised dot product of model 4.
    """

    def __init__(self, width: int, heads: int, temporal_heads: int) -> None:
        super().__init__(width, heads)
        self.temporal_heads = temporal_heads

    def forward(self, tokens: Tensor, groups: Sequence[tuple[int, ...]]) -> Tensor:
        """Attend; tokens (total_tokens, width) to the same shape; `groups` are `Grids`."""
        parts = self.qkv(tokens).split([math.prod(grid) for grid in groups])
        return self.proj(
            join([self._attend_grid(part, *grid) for part, grid in zip(parts, groups, strict=True)])
        )

    def _attend_grid(self, qkv: Tensor, samples: int, times: int, places: int) -> Tensor:
        width = qkv.shape[-1] // 3
        qkv = qkv.view(samples, times, places, 3, self.heads, width // self.heads)
        along_time, along_space = qkv.split([self.temporal_heads, self.heads - self.temporal_heads], dim=4)
        attended = []
        if along_time.shape[4]:
            query, key, value = along_time.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)
            result = F.scaled_dot_product_attention(query, key, value)  # (samples * places, heads, times, …)
            attended.append(result.unflatten(0, (samples, places)).permute(0, 3, 1, 2, 4))
        if along_space.shape[4]:
            query, key, value = along_space.permute(3, 0, 1, 4, 2, 5).flatten(1, 2).unbind(0)
            result = F.scaled_dot_product_attention(query, key, value)  # (samples * times, heads, places, …)
            attended.append(result.unflatten(0, (samples, times)).transpose(2, 3))
        whole = attended[0] if len(attended) == 1 else torch.cat(attended, dim=3)
        return whole.reshape(-1, width)  # from (samples, times, places, heads, width / heads)


class SplitBlock(Block):
    """A block of ViViT's model 4: half of its heads attend along time, half along space."""

    def __init__(self, width: int, heads: int, hidden: int, gelu: Gelu) -> None:
        super().__init__(width, heads, hidden, gelu=gelu)
        self.attn = GridAttention(width, heads, heads // 2)


class FactorisedBlock(nn.Module):
    """A block of ViViT's model 3: attention over space, then over time (or the other way), then the MLP."""

    branches = 3

    def __init__(self, width: int, heads: int, hidden: int, gelu: Gelu, *, time_first: bool) -> None:
        super().__init__()
        self.time_first = time_first
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.temporal_norm = LayerNorm(width)
        self.temporal_attn = GridAttention(width, heads, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, hidden, gelu)

    def forward(self, tokens: Tensor, grids: Grids, depth: Tensor | None = None) -> Tensor:
        """Run the block; tokens (total_tokens, width), depth (3, total_tokens, 1) of `noise.depth_scales`."""
        scales = (None, None, None) if depth is None else depth.unbind(0)
        if self.time_first:
            tokens = self._attend_time(tokens, grids, scales[0])
        tokens = add(tokens, self.attn(self.norm1(tokens), by_frame(grids)), scales[1])
        if not self.time_first:
            tokens = self._attend_time(tokens, grids, scales[0])
        return add(tokens, self.mlp(self.norm2(tokens)), scales[2])

    def _attend_time(self, tokens: Tensor, grids: Grids, scale: Tensor | None) -> Tensor:
        return add(tokens, self.temporal_attn(self.temporal_norm(tokens), grids), scale)


class DividedBlock(nn.Module):
    """A block of TimeSformer's divided attention (arXiv 2102.05095, §3): time, then space, then the MLP.

    The class token takes no part in the attention over time; in that over space each frame sees a copy, and
    what the copies become is averaged. The linear layer behind the temporal attention starts at zero.
    """

    branches = 3

    def __init__(self, width: int, heads: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.temporal_norm = LayerNorm(width)
        self.temporal_attn = GridAttention(width, heads, heads)
        self.temporal_fc = ZeroLinear(width, width)
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, hidden, gelu)

    def forward(
        self,
        first: Tensor,
        tokens: Tensor,
        grids: Grids,
        depth: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            first: the class tokens, (total_samples, width).
            tokens: all others, (total_tokens, width).
            grids: what the rows are.
            depth: scales of the branches for both, (3, rows, 1) each.
        """
        of_first, of_tokens = (
            ((None,) * 3, (None,) * 3) if depth is None else (part.unbind(0) for part in depth)
        )
        branch = self.temporal_fc(self.temporal_attn(self.temporal_norm(tokens), grids))
        tokens = add(tokens, branch, of_tokens[0])
        framed = self._with_first(first, tokens, grids)
        attended = self.attn(self.norm1(framed), by_frame(grids, 1))
        first_branch, branch = _apart(attended, grids)
        first, tokens = add(first, first_branch, of_first[1]), add(tokens, branch, of_tokens[1])
        branches = self.mlp(self.norm2(torch.cat((first, tokens)))).split([first.shape[0], tokens.shape[0]])
        return add(first, branches[0], of_first[2]), add(tokens, branches[1], of_tokens[2])

    def _with_first(self, first: Tensor, tokens: Tensor, grids: Grids) -> Tensor:
        """A copy of the class token before the tokens of each frame."""
        parts = zip(
            first.split([samples for samples, _, _ in grids]),
            tokens.split([math.prod(grid) for grid in grids]),
            grids,
            strict=True,
        )
        framed = []
        for one, part, (samples, times, places) in parts:
            copies = one.view(samples, 1, 1, -1).expand(samples, times, 1, -1)
            framed.append(torch.cat((copies, part.view(samples, times, places, -1)), dim=2).flatten(0, 2))
        return join(framed)


def _apart(framed: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
    """Class tokens, averaged over the frames of a sample, and all other tokens."""
    first, tokens = [], []
    parts = framed.split([samples * times * (places + 1) for samples, times, places in grids])
    for part, (samples, times, places) in zip(parts, grids, strict=True):
        whole = part.view(samples, times, places + 1, -1)
        first.append(whole[:, :, 0].mean(dim=1))
        tokens.append(whole[:, :, 1:].flatten(0, 2))
    return join(first), join(tokens)
