"""Optimizers, their parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from framework.errors import RecipeError
from framework.recipe.schema import Optimizer, Recipe, Schedule

__all__ = ["build_optimizer", "learning_rate", "parameter_groups", "resolve_schedule"]


def resolve_schedule(recipe: Recipe, samples: Mapping[str, int]) -> Schedule:
    """The schedule with its warm-up in steps; a recipe may say it in epochs of the mixture's first source.

    Args:
        recipe: the whole recipe.
        samples: how many samples each source has.

    Errors:
        RecipeError: a warm-up that is as long as the training.
    """
    epochs = recipe.schedule.warmup_epochs
    if epochs is None:
        return recipe.schedule
    source, share = next(iter(recipe.data.samples.items()))
    steps = max(1, round(epochs * samples[source] / share))
    if steps >= recipe.train.steps:
        raise RecipeError(
            f"schedule.warmup_epochs: {epochs} epochs of {source} are {steps} steps, and the training has "
            f"{recipe.train.steps} (train.steps); an epoch is {samples[source] / share:.0f} steps"
        )
    return recipe.schedule.model_copy(update={"warmup": steps, "warmup_epochs": None})


def learning_rate(step: int, *, base: float, steps: int, schedule: Schedule) -> float:
    """The learning rate that step `step` (counted from 0) is taken with.

    Linear warm-up over `schedule.warmup` steps, then cosine (or nothing) towards `schedule.final * base`,
    which step `steps` would have (TubeViT Table 10: cosine with linear warm-up).
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
