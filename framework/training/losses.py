"""The loss of one source: cross-entropies with label smoothing and mixup, of one class or of many.

All randomness is counter-based, so a batch is mixed in the same way on any number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import RecipeError
from framework.recipe.schema import Recipe
from framework.targets import TargetSpec

__all__ = [
    "Mixing",
    "binary_cross_entropy",
    "check_mixing",
    "cross_entropy",
    "draw_mixing",
    "mix_pixels",
    "source_loss",
]


class Mixing:
    """How the neighbours (2i, 2i + 1) of a micro-batch are mixed: `share` (batch,) of each row stays.

    Neighbours are samples: where each has `repeats` rows, the n-th of one is mixed with the other's n-th.
    """

    def __init__(self, share: Tensor, repeats: int = 1) -> None:
        self.share = share
        rows = torch.arange(share.shape[0], device=share.device)
        self.partner = (rows // repeats ^ 1) * repeats + rows % repeats


def check_mixing(recipe: Recipe, world: int) -> None:
    """Make sure that every sample of a source with mixup will have a partner, before anything is built.

    Errors:
        RecipeError: the samples of a micro-batch are odd.
    """
    for name, count in recipe.data.samples.items():
        if recipe.data.sources[name].mixup > 0:
            _check_pairs(name, count // (world * recipe.train.accumulation))


def _check_pairs(source: str, samples: int) -> None:
    if samples % 2:
        raise RecipeError(
            f"source {source}: mixup needs an even number of samples in each micro-batch, here there are "
            f"{samples}. Change data.mixture.{source}, train.accumulation or the number of ranks"
        )


def draw_mixing(alpha: float, seeds: Tensor, source: str, repeats: int = 1) -> Mixing | None:
    """Draw mixup's share for each pair of neighbours from Beta(alpha, alpha) (Zhang et al., 2018).

    Args:
        alpha: parameter of the Beta distribution; 0 turns mixing off.
        seeds: (batch,) the rows' counter-based seeds; a pair uses the one of its first row.
        source: named in the error.
        repeats: rows of each sample, one after another; a sample is never mixed with itself.

    Errors:
        RecipeError: the samples of the micro-batch are odd, so that one has no partner.
    """
    if alpha == 0:
        return None
    _check_pairs(source, seeds.shape[0] // repeats)
    keys = seeds.cpu().numpy().view(np.uint64).reshape(-1, 2, repeats)[:, 0].ravel()
    shares = [
        np.random.Generator(np.random.Philox(key=int(key) ^ 0x6D69787570)).beta(alpha, alpha) for key in keys
    ]
    both = torch.tensor(shares, dtype=torch.float32, device=seeds.device).view(-1, 1, repeats)
    return Mixing(both.expand(-1, 2, -1).reshape(-1), repeats)


def mix_pixels(pixels: Tensor, mixing: Mixing) -> Tensor:
    """Blend each sample with its partner: uint8 (batch, 3, frames, height, width) in and out."""
    share = mixing.share.view(-1, 1, 1, 1, 1)
    blended = torch.addcmul(pixels * share, pixels[mixing.partner], 1 - share)
    return blended.round_().to(torch.uint8)


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, mixing: Mixing | None = None
) -> Tensor:
    """Mean cross-entropy over a micro-batch.

    Args:
        logits: (batch, classes), float32.
        labels: (batch,) int64.
        smoothing: probability mass that is spread over all classes.
        mixing: how the samples were mixed; their labels are mixed in the same way.
    """
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")  # (batch,)
    if mixing is not None:
        partners = F.cross_entropy(
            logits, labels[mixing.partner], label_smoothing=smoothing, reduction="none"
        )
        losses = mixing.share * losses + (1 - mixing.share) * partners
    return losses.mean()


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, mixing: Mixing | None = None
) -> Tensor:
    """Mean binary cross-entropy over the classes and samples of a micro-batch, for multi-label sources.

    Smoothing is the formula of `cross_entropy`, (1 - smoothing) label + smoothing / classes: every class is
    given the same small share, so that a sample with one class has the same targets in both losses.

    Args:
        logits: (batch, classes), float32.
        labels: (batch, classes) float32, zeros and ones.
        smoothing: see above.
        mixing: how the samples were mixed; their labels are mixed in the same way.
    """
    wanted = labels
    if mixing is not None:
        share = mixing.share.unsqueeze(1)
        wanted = share * labels + (1 - share) * labels[mixing.partner]
    wanted = (1 - smoothing) * wanted + smoothing / labels.shape[1]
    return F.binary_cross_entropy_with_logits(logits, wanted)


def source_loss(
    targets: TargetSpec,
    logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    mixing: Mixing | None = None,
) -> Tensor:
    """The loss of a source on a micro-batch: cross-entropy, its sum over heads, or the binary one.

    Args:
        targets: what kind of labels these are.
        logits: (batch, classes of all heads), float32.
        labels: as of `framework.data.loader.Group`.
        smoothing: of the labels.
        mixing: how the samples were mixed.
    """
    if targets.kind == "multi":
        return binary_cross_entropy(logits, labels, smoothing, mixing)
    if targets.kind == "single":
        return cross_entropy(logits, labels, smoothing, mixing)
    parts = zip(logits.split(targets.sizes, dim=1), labels.unbind(1), strict=True)
    return torch.stack([cross_entropy(part, label, smoothing, mixing) for part, label in parts]).sum()
