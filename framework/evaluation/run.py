"""Evaluating a model on held-out samples, each exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.data.loader import EvalBatch, evaluation_batches
from framework.data.sources import OpenSource
from framework.evaluation.metrics import SourceResult, Tally
from framework.evaluation.multi_label import MultiLabelResult, MultiLabelTally
from framework.evaluation.several_heads import HeadsResult, HeadsTally
from framework.recipe.schema import Evaluation
from framework.targets import TargetSpec
from framework.world import World

__all__ = [
    "AnyResult",
    "Forward",
    "HeadsResult",
    "MultiLabelResult",
    "Observer",
    "SourceResult",
    "evaluate",
    "new_tally",
]

AnyResult = SourceResult | MultiLabelResult | HeadsResult
"""The result of a source; which one, its labels decide. All have samples, loss, metrics() and words()."""

Forward = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Pixels per source (batch, 3, frames, height, width), uint8, to logits per source (batch, classes)."""

Observer = Callable[[str, EvalBatch, Tensor], None]
"""Called with source, batch and logits (batch, views, classes) on this rank."""


@torch.no_grad()
def evaluate(
    forward: Forward,
    sources: Mapping[str, OpenSource],
    world: World,
    device: torch.device,
    settings: Evaluation,
    *,
    shuffle_frames: bool = False,
    workers: int = 0,
    observe: Observer | None = None,
) -> dict[str, AnyResult]:
    """Every sample of every source once over all ranks; the same results on every rank.

    Every rank calls `forward` equally often with batches of equal size, so that a sharded model stays in
    step; a batch holds one view of `settings.batch` samples, whatever the number of views. With more than
    one rank torch.distributed must be initialised. The caller has put the model in evaluation mode.

    Errors:
        DataError: a sample that is corrupt, or samples that were not seen exactly once.
    """
    results = {}
    for name, source in sources.items():
        tally = new_tally(source.source.targets, device)
        for batch in evaluation_batches(
            source,
            world,
            temporal_views=settings.temporal_views,
            spatial_views=settings.spatial_views,
            batch=settings.batch,
            workers=workers,
            shuffle_frames=shuffle_frames,
        ):
            logits = _logits_of_views(forward, name, batch.pixels, device)
            labels, index, valid = (part.to(device) for part in (batch.labels, batch.index, batch.valid))
            tally.add(logits, labels, index, valid)
            if observe is not None:
                observe(name, batch, logits)
        results[name] = tally.result(name, len(source.selection), world)
    return results


def new_tally(targets: TargetSpec, device: torch.device) -> Tally | MultiLabelTally | HeadsTally:
    """What counts samples with such labels."""
    if targets.kind == "multi":
        return MultiLabelTally(targets.outputs, device)
    return HeadsTally(targets, device) if targets.kind == "heads" else Tally(targets.outputs, device)


def _logits_of_views(forward: Forward, name: str, pixels: Tensor, device: torch.device) -> Tensor:
    """(batch, views, 3, frames, height, width) -> float32 (batch, views, classes), one view at a time."""
    logits = []
    for view in range(pixels.shape[1]):
        inputs = pixels[:, view].contiguous().to(device, non_blocking=True)
        logits.append(forward({name: inputs})[name].float())
    return torch.stack(logits, dim=1)
