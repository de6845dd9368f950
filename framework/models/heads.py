"""From the vector of a sample to the logits of its source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.models.inputs import InputSpec
from framework.models.layers import Head

__all__ = ["Heads", "build_head"]


class Heads(nn.ModuleDict):
    """Several classifiers of one source, such as verb and noun; their logits stand side by side."""

    def forward(self, input: Tensor) -> Tensor:
        """Logits of pooled samples: (samples, width) to float32 (samples, classes of all heads)."""
        return torch.cat([head(input) for head in self.values()], dim=1)


def build_head(width: int, spec: InputSpec) -> nn.Module:
    """The classifier of a source, or one for each of its heads."""
    if not spec.heads:
        return Head(width, spec.classes)
    return Heads({name: Head(width, classes) for name, classes in spec.heads})
