"""What people would use instead: other libraries' ViTs with as many tokens, and PyTorch's own encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RIVALS", "Rival", "Shape", "build_rival"]

CLASSES = 400


@dataclass(frozen=True)
class Shape:
    """The numbers of an encoder, and how many tokens and samples it reads."""

    width: int
    depth: int
    heads: int
    tokens: int
    batch: int

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of a picture that makes so many patches of 16 pixels."""
        rows = max(count for count in range(1, math.isqrt(self.tokens) + 1) if self.tokens % count == 0)
        return 16 * rows, 16 * (self.tokens // rows)


class Rival:
    """A model of another library with its training step."""

    def __init__(
        self, model: nn.Module, pixels: Tensor, logits: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        self.model = model
        self._pixels = pixels
        self._logits = logits
        self._labels = torch.randint(CLASSES, (len(pixels),), device=pixels.device)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(self) -> None:
        """As such models are commonly trained: fp32 weights under bf16 autocast, clipping, fused AdamW."""
        device = self._pixels.device.type
        with torch.autocast(device, torch.bfloat16):
            logits = self._logits(self.model, self._pixels)
        F.cross_entropy(logits.float(), self._labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def build_rival(name: str, shape: Shape, device: torch.device) -> Rival:
    """Build one by name.

    Errors:
        ImportError: its library is not installed.
    """
    torch.manual_seed(0)
    return RIVALS[name](shape, device)


def _timm(shape: Shape, device: torch.device) -> Rival:
    from timm.models.vision_transformer import VisionTransformer

    with device:
        model = VisionTransformer(
            img_size=shape.pixels,
            patch_size=16,
            num_classes=CLASSES,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            class_token=False,
            global_pool="avg",
        )
    pixels = torch.randn(shape.batch, 3, *shape.pixels, device=device)
    return Rival(model, pixels, lambda module, images: module(images))


def _video_mae(shape: Shape, device: torch.device) -> Rival:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    make_config: Any = VideoMAEConfig  # its stubs do not know what all configurations take
    config = make_config(
        image_size=shape.pixels,
        patch_size=16,
        num_frames=2,
        tubelet_size=2,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    with device:
        model: nn.Module = VideoMAEForVideoClassification(config)
    pixels = torch.randn(shape.batch, 2, 3, *shape.pixels, device=device)
    return Rival(model, pixels, lambda module, clips: module(clips).logits)


class _PlainEncoder(nn.Module):
    """The same model as PyTorch's own parts make it in twenty lines."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, shape.width, 16, 16)
        self.positions = nn.Parameter(torch.zeros(1, shape.tokens, shape.width))
        layer = nn.TransformerEncoderLayer(
            shape.width,
            shape.heads,
            4 * shape.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, shape.depth, norm=nn.LayerNorm(shape.width), enable_nested_tensor=False
        )
        self.head = nn.Linear(shape.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(1))


def _pytorch(shape: Shape, device: torch.device) -> Rival:
    with device:
        model = _PlainEncoder(shape)
    pixels = torch.randn(shape.batch, 3, *shape.pixels, device=device)
    return Rival(model, pixels, lambda module, images: module(images))


RIVALS: dict[str, Callable[[Shape, torch.device], Rival]] = {
    "timm VisionTransformer": _timm,
    "transformers VideoMAE": _video_mae,
    "torch TransformerEncoder": _pytorch,
}
