"""What a sample costs to decode, measured on samples of the recipe's own shards where these are there."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from framework.data.manifest import MANIFEST_NAME
from framework.data.randomness import sample_seed
from framework.data.samples import SampleReader
from framework.data.sources import OpenSource, open_sources
from framework.data.urls import place_of
from framework.errors import CorruptSample, DataError
from framework.recipe.schema import Recipe

__all__ = ["MEASURED_SAMPLES", "decode_costs", "local_decode_costs"]

log = logging.getLogger(__name__)

MEASURED_SAMPLES = 8
"""Of each source."""


def local_decode_costs(recipe: Recipe, count: int = MEASURED_SAMPLES) -> dict[str, float]:
    """`decode_costs` of the sources whose shards lie on this machine; nothing is fetched.

    Shards that do not fit the recipe, or cannot be read, are told, and left to the estimate.
    """
    costs: dict[str, float] = {}
    for name in recipe.data.mixture:
        try:
            place = place_of(recipe.data.sources[name].path)
            if not isinstance(place, Path) or not (place / MANIFEST_NAME).is_file():
                continue
            alone = recipe.data.model_copy(update={"mixture": {name: recipe.data.mixture[name]}})
            costs |= decode_costs(recipe, open_sources(recipe.model_copy(update={"data": alone})), count)
        except DataError as error:
            log.warning("what %s costs to decode is estimated: %s", name, error)
    return costs


def decode_costs(recipe: Recipe, sources: Mapping[str, OpenSource], count: int) -> dict[str, float]:
    """Processor milliseconds of a sample of each source, over `count` samples; without any it is left out.

    Errors:
        DataError: a shard cannot be read.
    """
    costs = {name: _decode_cost(recipe, opened, count) for name, opened in sources.items()}
    return {name: cost for name, cost in costs.items() if cost}


def _decode_cost(recipe: Recipe, opened: OpenSource, count: int) -> float | None:
    """Processor milliseconds from bytes to all training views of a sample, the mean over `count`; or None.

    Samples are of the first shard, so that of a remote source one shard comes. Corrupt ones are passed over.
    """
    reader, spent, done = SampleReader(opened), 0.0, 0
    views = range(opened.source.repeats)
    for index in range(min(len(opened), count + 1)):
        seeds = [sample_seed(recipe.seed, opened.name, 0, index, view) for view in views]
        began = time.process_time()
        try:
            reader.training_views(reader.info(index), seeds)
        except CorruptSample:
            continue
        if index:  # the first one also loads the decoder
            spent, done = spent + time.process_time() - began, done + 1
    return spent / done * 1e3 if done else None
