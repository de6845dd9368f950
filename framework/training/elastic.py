"""Another number of ranks: what a rank computes at once stays as large as it was. Needs no torch.

The global batch is the recipe's mixture, whoever shares it. So with fewer ranks each rank's share grows, and
a share that no longer fits into its memory would end a run that a scheduler has given fewer nodes. Therefore
`train.accumulation` is raised when a run comes back on fewer ranks, and falls again when they return.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.recipe.schema import Recipe
from framework.watch.attempts import attempts_of

__all__ = ["fit_accumulation", "fitted", "with_accumulation"]


def fitted(recipe: Recipe, run: Path, ranks: int) -> Recipe:
    """The recipe with the accumulation that suits so many ranks, given how the run was trained before."""
    asked = recipe.train.accumulation
    accumulation = fit_accumulation(recipe.data.samples, asked, ranks, attempts_of(run))
    return with_accumulation(recipe, accumulation)


def fit_accumulation(
    samples: Mapping[str, int], asked: int, ranks: int, attempts: Sequence[Mapping[str, Any]]
) -> int:
    """The smallest number of micro-batches a step with which none is larger than it was.

    That is measured on the attempt for which `asked` was chosen: the first of the last ones that have it.
    `samples` are those of each source in a step. The number that was asked for is returned where no other
    would fit better or divide them.
    """
    reference: Mapping[str, Any] | None = None
    for attempt in reversed(attempts):
        if attempt.get("asked_accumulation") != asked:
            break
        reference = attempt
    if reference is None or reference["ranks"] == ranks:
        return asked
    parts = reference["ranks"] * reference["accumulation"]
    common = math.gcd(*samples.values())
    fitting = (count for count in range(1, common // ranks + 1) if common % (ranks * count) == 0)
    return next((count for count in fitting if ranks * count >= parts), asked)


def with_accumulation(recipe: Recipe, accumulation: int) -> Recipe:
    """The recipe with another number of micro-batches a step."""
    if accumulation == recipe.train.accumulation:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"accumulation": accumulation})})
