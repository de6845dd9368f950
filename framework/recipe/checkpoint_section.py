"""The `checkpoint` section of a recipe: when and how to save, and what to keep."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from framework.recipe.sections import BrokenRule, NonNegative, Positive, Section

__all__ = ["Best", "Checkpoint", "check_best"]


class Best(Section):
    """Checkpoints that stay because they are the best so far by a metric of the journal."""

    metric: Annotated[str, Field(min_length=1, examples=["eval/k400/top_1"])]
    """As the journal names it: `eval/SOURCE/top_1`, `train/loss`, …"""
    keep: Positive = 1
    """So many of them."""
    mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value is the best."""


class Checkpoint(Section):
    """When to save and what to keep."""

    every: Positive = 1000
    """Steps between checkpoints; the last step is always saved."""
    mode: Literal["async", "sync"] = "async"
    """`async` copies the state to host memory and writes while training goes on; `sync` lets it wait."""
    keep: Positive = 3
    """The newest so many stay."""
    keep_every: NonNegative = 0
    """Checkpoints at multiples of this step stay for ever; 0: none."""
    best: Best | None = None
    """These stay besides; null: none."""


def check_best(checkpoint: Checkpoint, log_every: int, eval_every: int) -> None:
    """Make sure that the metric is known at the steps that are saved.

    Errors:
        BrokenRule: it never would be.
    """
    if checkpoint.best is None:
        return
    metric, every = checkpoint.best.metric, checkpoint.every
    path = ("checkpoint", "best", "metric")
    if metric.startswith("eval/"):
        if eval_every == 0:
            raise BrokenRule(f"{metric} is only known after the last step: set train.eval_every", *path)
        if eval_every % every and every % eval_every:
            raise BrokenRule(
                f"{metric} is evaluated every {eval_every} steps (train.eval_every) and saved every {every}: "
                "one must be a multiple of the other",
                *path,
            )
    elif every % log_every and log_every % every:
        raise BrokenRule(
            f"{metric} is logged every {log_every} steps (train.log_every) and saved every {every}: one must "
            "be a multiple of the other",
            *path,
        )
