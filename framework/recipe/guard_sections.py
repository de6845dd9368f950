"""The `guards` section of a recipe: when a training that goes wrong says so, or ends by itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from framework.recipe.sections import BrokenRule, NonNegative, Positive, Section

__all__ = ["Guards"]


class Guards(Section):
    """When a training that goes wrong ends by itself; 0 turns a guard off."""

    collapse: NonNegative = 20
    """Logging points after the warm-up, in a row, with a loss flat at ln(classes) and accuracy at chance."""
    dead: NonNegative = 50
    """Steps, in a row, in which a trainable tensor gets no gradient or zeros alone."""
    hang_seconds: Annotated[float, Field(ge=0, le=1e6)] = 1200.0
    """Without progress for so long a rank hangs, and the job is ended with a post-mortem; three times as long
    for the first step, checkpoints and a batch of an evaluation."""
    on_bad_numbers: Literal["warn", "skip", "rollback"] = "warn"
    """After NaN or Inf in loss or gradients, and after a loss spike. An update that is not finite is never
    applied. `warn` says which samples it was; `skip` also drops the update of a spike; `rollback` goes back
    to the last valid checkpoint and trains without those samples."""
    spike: Annotated[float, Field(ge=0)] = 0.0
    """A loss so many robust standard deviations (1.4826 MAD) above the median of the window is a spike."""
    window: Annotated[int, Field(ge=8, le=100_000)] = 128
    """Steps whose losses a spike is measured against."""
    bad_limit: Positive = 10
    """So many bad steps among the last 100, or rollbacks to one checkpoint, end the training."""

    @model_validator(mode="after")
    def _spikes_are_rare(self) -> Guards:
        if 0 < self.spike < 3:
            raise BrokenRule("below 3, every hundredth step of a sound training is a spike", "spike")
        return self
