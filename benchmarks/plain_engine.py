"""A training without DeepSpeed, for benchmarks that take its steps in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["PlainEngine"]


class PlainEngine:
    """The few things of DeepSpeed's engine that a step and a checkpoint ask for."""

    global_rank = 0

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module = module
        self.optimizer = optimizer

    def __call__(self, *inputs: Any) -> Any:
        """What the model gives."""
        return self.module(*inputs)

    def zero_optimization_stage(self) -> int:
        """Nothing is sharded."""
        return 0
