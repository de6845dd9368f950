"""Optimizers, their parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from framework.recipe.schema import Optimizer, Schedule

__all__ = ["build_optimizer", "learning_rate", "parameter_groups"]


def learning_rate(step: int, *, base: float, steps: int, schedule: Schedule) -> float:
    """The learning rate that step `step` (counted from 0) is taken with.

    Linear warm-up over `schedule.warmup` steps, then cosine (or nothing) down to `schedule.final * base` at
    the last step (TubeViT Table 10: cosine with linear warm-up).
    """
    if step < schedule.warmup:
        return base * (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return base
    progress = (step - schedule.warmup) / max(1, steps - schedule.warmup)
    return base * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters, those that decay apart from those that do not (biases, norms, queries)."""
    exempt: set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if p.ndim > 1 and name not in exempt]
    spared = [p for name, p in trainable if p.ndim <= 1 or name in exempt]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the recipe over the model's trainable parameters."""
    groups: Iterable[dict[str, object]] = parameter_groups(model, settings.weight_decay)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    # Fused on CPUs too: the plain loop makes two copies of every flat tensor in each step.
    return kind(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
