"""The batches of a recipe, and all that a step holds: what the tests of the loader compare."""

from __future__ import annotations

import torch

from framework.data.loader import Batch, training_batches
from framework.data.sources import build_plan, open_sources
from framework.recipe.schema import Recipe
from framework.world import World

STEPS = 5


def batches_of(recipe: Recipe, world: World, start: int = 0, stop: int = STEPS) -> list[Batch]:
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    return list(training_batches(recipe, sources, plan, world, start_step=start, stop_step=stop))


def merged(batches: list[Batch]) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """Everything that all ranks and micro-batches of a step hold, in order."""
    rows: dict[tuple[int, str], dict[str, list[torch.Tensor]]] = {}
    for batch in batches:
        for name, group in batch.groups.items():
            target = rows.setdefault((batch.step, name), {})
            for field, tensor in vars(group).items():
                target.setdefault(field, []).append(tensor)
    return {key: {field: torch.cat(parts) for field, parts in value.items()} for key, value in rows.items()}
