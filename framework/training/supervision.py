"""What a training must know of whoever started it and may start it again: a Slurm job, or a loop here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["GOES_ON", "Supervision"]

GOES_ON = 85
"""Exit code of ranks that have saved because they were asked to, and want to be started again."""


@dataclass(frozen=True)
class Supervision:
    """The supervisor of an attempt, seen from its ranks."""

    goes_on: Callable[[int], bool]
    """Asked on rank 0 after the last checkpoint: will the run, stopped by this signal, be started again?"""
    by_people: bool = False
    """Signals come from people alone, who want the run to end; no scheduler sends any."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What MLflow should say of this attempt: the job's id, its nodes."""
