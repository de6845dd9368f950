"""Labels as tensors: one number, a row of zeros and ones, or one number for each head."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from framework.data.datasets import DatasetInfo, class_names, rows_of
from framework.data.manifest import SampleInfo
from framework.data.sources import OpenSource
from framework.targets import TargetSpec

__all__ = [
    "chosen_classes",
    "class_shares",
    "guessed_classes",
    "label_row",
    "label_text",
    "new_labels",
]


def new_labels(targets: TargetSpec, rows: int) -> torch.Tensor:
    """Zeros for the labels of so many samples.

    int64 (rows,) for single labels, float32 (rows, classes) for multi-label, int64 (rows, heads) for heads.
    """
    if targets.kind == "multi":
        return torch.zeros(rows, targets.outputs)
    shape = (rows,) if targets.kind == "single" else (rows, len(targets.sizes))
    return torch.zeros(shape, dtype=torch.int64)


def label_row(targets: TargetSpec, info: SampleInfo) -> torch.Tensor:
    """The label of one sample, a row of `new_labels`."""
    if targets.kind == "single":
        return torch.tensor(info.label)
    chosen = torch.tensor(info.targets, dtype=torch.int64)
    return torch.zeros(targets.outputs).index_fill_(0, chosen, 1.0) if targets.kind == "multi" else chosen


def chosen_classes(targets: TargetSpec, row: torch.Tensor) -> list[int]:
    """The classes that a row of labels names: back from `label_row`."""
    if targets.kind == "multi":
        return row.nonzero().flatten().tolist()
    return row.flatten().tolist()


def guessed_classes(targets: TargetSpec, logits: torch.Tensor, count: int) -> list[int]:
    """The best class or classes of one sample's logits (classes,), for people to compare with the true ones.

    Multi-label: as many as truly apply, at least one; with heads one for each.
    """
    if targets.kind == "multi":
        return sorted(logits.topk(max(1, count)).indices.tolist())
    return [int(part.argmax()) for part in logits.split(targets.sizes)]


def label_text(dataset: DatasetInfo, chosen: list[int]) -> str:
    """The names of a sample's classes, for people."""
    return ", ".join(class_names(dataset, chosen)) or "none"


def class_shares(opened: OpenSource) -> NDArray[np.float64]:
    """The share of a multi-label source's samples to which each class applies: (classes,)."""
    _, targets = rows_of(*opened.manifest.targets(), np.asarray(opened.selection))
    return np.bincount(targets, minlength=opened.source.classes) / len(opened)
