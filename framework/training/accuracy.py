"""What a logging point says of accuracy on training samples, for every kind of label."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.targets import TargetSpec

__all__ = ["accuracy_names", "right_answers"]


def accuracy_names(targets: TargetSpec) -> list[str]:
    """The names of the rows of `right_answers`.

    `top_1`: the best class is the label; with heads, the best classes of all heads together (what Epic
    Kitchens calls the action), and then of each head. Multi-label: `hit_1`, the best class is among those
    that apply.
    """
    if targets.kind == "multi":
        return ["hit_1"]
    return ["top_1", *(f"{name}_top_1" for name in targets.names)]


def right_answers(targets: TargetSpec, logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples count as right: (batch, classes) logits and labels to bool (names, batch)."""
    if targets.kind == "multi":
        return labels.gather(1, logits.argmax(dim=1, keepdim=True)).T > 0
    if targets.kind == "single":
        return (logits.argmax(dim=1) == labels).unsqueeze(0)
    parts = zip(logits.split(targets.sizes, dim=1), labels.unbind(1), strict=True)
    right = torch.stack([part.argmax(dim=1) == label for part, label in parts])
    return torch.cat([right.all(dim=0, keepdim=True), right])
