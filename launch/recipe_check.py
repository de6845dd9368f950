"""What is looked at before a run is queued: all that its training would refuse at its start."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from framework.errors import DataError, RecipeError
from framework.recipe.schema import Recipe
from framework.training.checkpoint_manifest import MANIFEST
from framework.world import World
from launch.submission import Submission, newest_step

__all__ = ["check_recipe"]

log = logging.getLogger(__name__)


def check_recipe(recipe: Recipe, submission: Submission) -> dict[str, int]:
    """What would otherwise fail after hours in the queue: tubes, clips, batch and ranks, runs and shards.

    Returns how many samples each source has.

    Errors:
        RecipeError: a tube has nothing to read, patches do not divide the clips of a run that is new, the
            ranks cannot share the batch, there is no such run as `init` names, or see `check_data`.
        DataError: shards that cannot be opened, or do not fit the recipe.
    """
    from framework.data.plan import check_shares
    from framework.recipe.patches import check_clips_are_divided
    from framework.recipe.tube_sets import check_tubes_are_read
    from framework.training.run_place import has_begun

    check_tubes_are_read(recipe)
    if not has_begun(Path(submission.run)):
        check_clips_are_divided(recipe)
    check_shares(recipe.data.mixture, submission.ranks, recipe.train.accumulation, recipe.data.repeats)
    if recipe.init is not None and not newest_step(Path(submission.run)):
        image = recipe.init.image.run if recipe.init.image else None
        for folder in filter(None, (recipe.init.weights, recipe.init.tubes, recipe.init.encoder, image)):
            if not any((Path(folder) / name).is_file() for name in ("recipe.yaml", MANIFEST)):
                raise RecipeError(f"init: {folder} is neither a run nor a checkpoint of one; train it first")
    return check_data(recipe if submission.local else with_cache_here(recipe), submission)


def check_data(recipe: Recipe, submission: Submission) -> dict[str, int]:
    """Look at the data as a training does at its start; returns how many samples each source has.

    Errors:
        RecipeError: a warm-up in epochs that is as long as the training, mixup of an odd number of samples,
            or a cache that is too small for what the plan needs at a time.
        DataError: shards that cannot be opened, or do not fit the recipe.
    """
    from framework.data.sources import build_plan, open_sources

    sources, held_out = open_sources(recipe), open_sources(recipe, "validation")
    plan = build_plan(recipe, sources)
    samples = {name: len(source) for name, source in sources.items()}
    # torch comes with these: whatever can be refused without it is refused before
    from framework.data.prefetch import check_cache
    from framework.training.losses import check_mixing
    from framework.training.optim import resolve_schedule

    resolve_schedule(recipe, samples)
    check_mixing(recipe, submission.ranks)
    world = World(0, submission.ranks, 0, submission.ranks_per_node)
    # a DataError is about room on this machine's disk, which says nothing of the nodes': they look again
    with suppress(DataError):
        check_cache(recipe, sources, held_out, plan, world)
    return samples


def with_cache_here(recipe: Recipe) -> Recipe:
    """The recipe with the default cache where its own cannot be written here: it may be a disk of the nodes.

    Before a submission nothing but the tables of samples goes through it.
    """
    settings, sources = recipe.data.cache, [recipe.data.sources[name] for name in recipe.data.mixture]
    remote = any("://" in place for one in sources for place in (one.path, one.validation) if place)
    if settings.folder is None or not remote:
        return recipe
    folder = Path(settings.folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return recipe
    except OSError as error:
        log.warning(
            "data.cache.folder: %s cannot be written on this machine (%s), where tables of samples go to the "
            "default cache now; make sure that the nodes can write it",
            folder,
            error.strerror,
        )
    cache = settings.model_copy(update={"folder": None})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": cache})})
