"""The pictures of the batch that a step of a recipe will see, as the model gets them."""

from __future__ import annotations

import html
from pathlib import Path

import numpy

from data_tools.page import data_address, grid_of, strip_of
from framework.data.labels import chosen_classes, label_text
from framework.data.loader import training_batches
from framework.data.sources import build_plan, open_sources
from framework.errors import RecipeError
from framework.files import replace_text
from framework.recipe.schema import Recipe
from framework.world import World

__all__ = ["write_step"]

_FRAMES = 8  # of a clip, at most


def write_step(recipe: Recipe, step: int, target: Path, *, world: int, rank: int) -> int:
    """Write what a rank sees in a step to a .png or .html file; returns the number of samples.

    Crops, flips and augmentation are those of training, which are a function of the step alone. What the GPU
    does afterwards (mixup, normalisation) is not in it.

    Errors:
        DataError: the shards cannot be opened or do not fit the recipe.
        RecipeError: no such rank, ranks that do not divide the mixture, or a file of another kind.
    """
    if target.suffix not in (".png", ".html"):
        raise RecipeError(f"{target}: the pictures of a step are a .png or an .html file")
    if not 0 <= rank < world:
        raise RecipeError(f"rank {rank} is not in 0 … {world - 1}: ranks count from 0 to world - 1")
    data = recipe.data.model_copy(update={"workers": 0})
    recipe = recipe.model_copy(update={"data": data})
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    batches = training_batches(recipe, sources, plan, World(rank, world), start_step=step, stop_step=step + 1)
    strips = []
    try:
        for batch in batches:
            for name, group in batch.groups.items():
                pixels = group.pixels.permute(0, 2, 3, 4, 1).numpy()  # (batch, frames, height, width, 3)
                keys = sources[name].keys(group.index.numpy())
                targets, dataset = sources[name].source.targets, sources[name].dataset
                for key, label, frames in zip(keys, group.labels, pixels, strict=True):
                    places = numpy.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round()
                    words = label_text(dataset, chosen_classes(targets, label))
                    strips.append((f"{key}: {words}", strip_of(frames[places.astype(int)])))
    finally:
        batches.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".png":
        grid_of(strips).save(target)
        return len(strips)
    title = f"{recipe.name}, step {step}, rank {rank} of {world}, plan {plan.hash}"
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="{data_address(strip)}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, strip in strips
    )
    replace_text(
        target,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<h1>{html.escape(title)}</h1>{figures}</html>",
    )
    return len(strips)
