"""How well a run shuffles its own samples, and what to change where it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from framework.data.plan import Plan
from framework.data.shuffling import shuffle_score
from framework.data.sources import OpenSource, build_plan
from framework.recipe.schema import Recipe

__all__ = ["mixing_of", "mixing_text"]

WINDOW = 8
"""Steps over which the classes are counted."""
_SORTED = 0.5
_ENOUGH = 0.5
_SAMPLES = 12


def mixing_of(recipe: Recipe, opened: OpenSource, plan: Plan) -> dict[str, Any]:
    """The shuffle score of a source, plain values only.

    `score` is that of its own labels over `window` steps, 1 as a random order; `sorted` is how much more
    often than in a random order neighbours in the shards have the same class, 1 for shards sorted by class.
    Both are None where samples have no single label, or all the same. `worst` is the score that sorted shards
    would have. `warning` says whether the shards are sorted and too little mixed; `block` is then a value of
    data.block that mixes them enough, if one does.
    """
    worst = _score(plan, opened, None, max(2, len(opened.dataset.classes)))
    labels = opened.manifest.column("label")[np.asarray(opened.selection)].astype(np.int64)
    _, labels = np.unique(labels, return_inverse=True)
    shares = np.bincount(labels) / len(labels)
    content = {"window": WINDOW, "worst": worst, "score": None, "sorted": None}
    if opened.dataset.target != "single" or len(shares) < 2:
        return {**content, "block": None, "warning": False}
    chance = float((shares**2).sum())
    together = float((labels[1:] == labels[:-1]).mean())
    order = max(0.0, (together - chance) / (1 - chance))
    score = _score(plan, opened, labels, len(shares))
    warning = order > _SORTED and score < _ENOUGH
    block = _enough(recipe, opened, labels, len(shares)) if warning else None
    return {**content, "score": score, "sorted": order, "block": block, "warning": warning}


def _score(plan: Plan, opened: OpenSource, labels: NDArray[np.int64] | None, classes: int) -> float:
    scores = shuffle_score(
        plan, opened.name, len(opened), classes=classes, windows=[WINDOW], samples=_SAMPLES, labels=labels
    )
    return scores[WINDOW]


def _enough(recipe: Recipe, opened: OpenSource, labels: NDArray[np.int64], classes: int) -> int | None:
    """The smallest of some longer blocks with which the source is mixed enough."""
    lane = -(-len(opened) // recipe.data.samples[opened.name])
    block, mixture = recipe.data.block, {opened.name: recipe.data.mixture[opened.name]}
    while block < lane:
        block = min(lane, 4 * block)
        data = recipe.data.model_copy(update={"block": block, "mixture": mixture})
        plan = build_plan(recipe.model_copy(update={"data": data}), {opened.name: opened})
        if _score(plan, opened, labels, classes) >= _ENOUGH:
            return block
    return None


def mixing_text(name: str, mixing: dict[str, Any], block: int) -> list[str]:
    """The score in words, and a warning where classes come in clumps."""
    window, worst = mixing["window"], f"{mixing['worst']:.2f}"
    if mixing["score"] is None:
        return [
            f"  shuffle {name}: {worst} over {window} steps if the shards were sorted by class (1: as mixed "
            "as in a random order, 0: not at all); no labels to compare"
        ]
    lines = [
        f"  shuffle {name}: {mixing['score']:.2f} over {window} steps (1: classes as mixed as in a random "
        f"order, 0: not at all); {worst} if the shards were sorted by class"
    ]
    if mixing["warning"]:
        if mixing["block"]:
            advice = f"raise data.block from {block} to {mixing['block']}"
        else:
            advice = (
                f"no data.block mixes them, so raise data.mixture.{name}, the places that a step draws from"
            )
        lines.append(
            f"  WARNING: the shards of {name} are sorted by class, and what steps draw from is too small to "
            f"mix them: {advice}; or shard the data anew with a shuffle, as `tubeworks data shard` does"
        )
    return lines
