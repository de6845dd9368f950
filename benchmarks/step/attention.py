"""The kernels that PyTorch has for attention, at the shapes of this framework's models."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["KERNELS", "attention_operations", "attention_step"]

KERNELS = {
    "as PyTorch chooses": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""By name; a kernel that does not take a shape, or is not there, says so with a RuntimeError."""


def attention_step(qkv: Tensor, heads: int, kernel: SDPBackend | None) -> Callable[[], None]:
    """Forward and backward pass of attention on (samples, tokens, 3 x width) as a block has them."""
    samples, tokens, triple = qkv.shape
    leaf = qkv.view(samples, tokens, 3, heads, triple // 3 // heads).requires_grad_()

    def work() -> None:
        leaf.grad = None
        query, key, value = (part.transpose(1, 2) for part in leaf.unbind(2))
        if kernel is None:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            with sdpa_kernel(kernel):
                attended = F.scaled_dot_product_attention(query, key, value)
        attended.backward(attended.detach())

    return work


def attention_operations(samples: int, tokens: int, width: int) -> float:
    """Operations of both passes: two products forward, and twice that backward; 2 per multiply-add."""
    return 3 * 4.0 * samples * tokens**2 * width
