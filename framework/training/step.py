"""One micro-batch through the model: pixels to the device, mixup, the joint forward pass, the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framework.recipe.schema import Source
from framework.training.host import sent
from framework.training.losses import Mixing, draw_mixing, mix_pixels, source_loss
from framework.training.meters import Meters

if TYPE_CHECKING:  # a step needs no shards, and `benchmarks.train_step` runs where their libraries are not
    from framework.data.loader import Batch
    from framework.training.numbers import StepNumbers

__all__ = ["micro_step"]


def micro_step(
    engine: Any,
    batch: Batch,
    sources: Mapping[str, Source],
    device: torch.device,
    meters: Meters,
    numbers: StepNumbers | None = None,
) -> Tensor:
    """The weighted sum of the sources' losses on one micro-batch, ready for `engine.backward`.

    A model that learns from pixels alone gives the losses itself, where others give logits.
    """
    pixels: dict[str, Tensor] = {}
    seeds: dict[str, Tensor] = {}
    mixings = {}
    for name, group in batch.groups.items():
        repeats = sources[name].repeats
        drawn = draw_mixing(sources[name].mixup, group.seeds, name, repeats)
        mixing = mixings[name] = drawn and Mixing(sent(drawn.share, device), repeats)
        seeds[name] = group.seeds.to(device, non_blocking=True)
        frames = group.pixels.to(device, non_blocking=True)
        pixels[name] = frames if mixing is None else mix_pixels(frames, mixing)
    logits = engine(pixels, seeds)
    own_losses = engine.module.returns_losses
    total = torch.zeros((), device=device)
    for name, group in batch.groups.items():
        labels = group.labels.to(device, non_blocking=True)
        source = sources[name]
        if own_losses:
            loss = logits[name].mean()
        else:
            loss = source_loss(source.targets, logits[name], labels, source.label_smoothing, mixings[name])
        meters.add(name, loss, logits[name].detach(), labels)
        if numbers is not None:
            numbers.add(name, group.index, logits[name])
        total = total + sources[name].loss_weight * loss
    if numbers is not None:
        numbers.micro_batch_done(total)
    return total
