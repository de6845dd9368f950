"""The pictures of the batch that a step of a recipe will see, as the model gets them."""

from __future__ import annotations

from pathlib import Path

import numpy

from data_tools.page import figure_of, grid_of, strip_of, write_html
from framework.data.labels import chosen_classes, label_text
from framework.data.listing import check_place
from framework.data.loader import training_batches
from framework.data.sources import build_plan, open_sources
from framework.errors import RecipeError
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
        RecipeError: no such step or rank, ranks that do not divide the mixture, or a file of another kind.
    """
    if target.suffix not in (".png", ".html"):
        raise RecipeError(f"{target}: the pictures of a step are a .png or an .html file")
    check_place(recipe, step, world, rank)
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
    if target.suffix == ".html":
        title = f"{recipe.name}, step {step}, rank {rank} of {world}, plan {plan.hash}"
        figures = "".join(figure_of(name, strip) for name, strip in strips)
        write_html(target, title, f'<div class="sheet">{figures}</div>')
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        grid_of(strips).save(target)
    return len(strips)
