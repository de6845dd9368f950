"""The samples of any step of any rank, without reading one of them."""

from __future__ import annotations

from typing import Any

from framework.data.sources import build_plan, open_sources
from framework.errors import RecipeError
from framework.recipe.schema import Recipe

__all__ = ["check_place", "listing"]


def listing(recipe: Recipe, step: int, world: int, rank: int) -> dict[str, Any]:
    """What a rank trains on in a step: sample keys per micro-batch and source, ready for JSON.

    {"plan": hash, "step", "world", "rank", "steps_per_epoch": {source: float}, "repeats": {source: views of
    each sample}, "micro_batches": [{source: [{"epoch", "index", "key"}, …]}, …]}

    Errors:
        DataError: the shards cannot be opened or do not fit the recipe.
        RecipeError: no such step or rank, or a mixture that `world` ranks do not divide.
    """
    check_place(recipe, step, world, rank)
    sources = open_sources(recipe, "train")
    plan = build_plan(recipe, sources)
    plan.check(world, recipe.train.accumulation)
    micro_batches = []
    for micro in range(recipe.train.accumulation):
        share = plan.share(step, rank=rank, world=world, micro=micro, accumulation=recipe.train.accumulation)
        micro_batches.append(
            {
                name: [
                    {"epoch": epoch, "index": index, "key": key}
                    for epoch, index, key in zip(
                        ids.epoch.tolist(), ids.index.tolist(), sources[name].keys(ids.index), strict=True
                    )
                ]
                for name, ids in share.items()
            }
        )
    return {
        "plan": plan.hash,
        "step": step,
        "world": world,
        "rank": rank,
        "steps_per_epoch": {name: plan.steps_per_epoch(name) for name in sources},
        "repeats": recipe.data.repeats,
        "micro_batches": micro_batches,
    }


def check_place(recipe: Recipe, step: int, world: int, rank: int) -> None:
    """That a training of this recipe on `world` ranks has this step and this rank.

    Errors:
        RecipeError: it has not.
    """
    if not 0 <= rank < world:
        raise RecipeError(f"rank {rank} is not in 0 … {world - 1}: ranks count from 0 to world - 1")
    if not 0 <= step < recipe.train.steps:
        raise RecipeError(
            f"step {step} is not in 0 … {recipe.train.steps - 1}: steps count from 0 to train.steps - 1"
        )
