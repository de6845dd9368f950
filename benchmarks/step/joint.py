"""Images and clips together: one pass over all tokens, a pass for each, or one pass padded to the longest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.models.layers import Block

__all__ = ["one_pass", "padded", "two_passes"]

Pixels = Mapping[str, Tensor]


def one_pass(model: nn.Module, pixels: Pixels) -> Callable[[], None]:
    """The framework's joint forward pass, and its backward pass."""

    def work() -> None:
        _backward(model(dict(pixels)).values())

    return work


def two_passes(model: nn.Module, pixels: Pixels) -> Callable[[], None]:
    """One source after the other; gradients add up."""

    def work() -> None:
        for name, tensor in pixels.items():
            _backward(model({name: tensor}).values())

    return work


def padded(model: nn.Module, pixels: Pixels) -> Callable[[], None]:
    """All samples as long as the longest, and a mask that keeps attention from the filling."""

    def work() -> None:
        _backward(padded_logits(model, pixels).values())

    return work


def padded_logits(model: nn.Module, pixels: Pixels) -> dict[str, Tensor]:
    """What the joint pass computes, by way of padding."""
    parts = {name: model.tokenizer([tensor]) for name, tensor in pixels.items()}  # type: ignore[operator]
    parts = {name: part.view(len(pixels[name]), -1, part.shape[-1]) for name, part in parts.items()}
    longest = max(part.shape[1] for part in parts.values())
    tokens = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts.values()])
    mask = torch.cat([_mask(part, longest) for part in parts.values()])
    blocks: Sequence[Block] = list(model.blocks)  # type: ignore[arg-type]
    for block in blocks:
        tokens = _masked_block(block, tokens, mask)
    logits, first = {}, 0
    for name, part in parts.items():
        samples, length = part.shape[:2]
        own = tokens[first : first + samples, :length].flatten(0, 1)
        pooled = model.pool(model.norm(own), ((samples, length),))  # type: ignore[operator]
        logits[name] = model.heads[name](pooled)  # type: ignore[index]
        first += samples
    return logits


def _mask(part: Tensor, longest: int) -> Tensor:
    """True where there is a token: (samples, 1, 1, longest)."""
    mask = torch.zeros(len(part), 1, 1, longest, dtype=torch.bool, device=part.device)
    mask[..., : part.shape[1]] = True
    return mask


def _masked_block(block: Block, tokens: Tensor, mask: Tensor) -> Tensor:
    samples, length, width = tokens.shape
    heads = block.attn.heads
    qkv = block.attn.qkv(block.norm1(tokens)).view(samples, length, 3, heads, width // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    tokens = tokens + block.attn.proj(attended.transpose(1, 2).reshape(samples, length, width))
    return tokens + block.mlp(block.norm2(tokens))


def _backward(logits: object) -> None:
    total = sum(part.float().square().mean() for part in logits)  # type: ignore[attr-defined]
    total.backward()  # type: ignore[union-attr]
