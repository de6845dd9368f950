"""What a run counts from step to step besides weights: it goes into checkpoints, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Counter", "Counters"]


class Counter(Protocol):
    """Something that counts over steps and must go on where it was."""

    def state(self) -> dict[str, Any]:
        """What this rank has counted, as JSON."""
        ...

    def restore(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on from the states of the ranks that saved, which may have been more or fewer than now."""
        ...


class Counters:
    """All counters of a run, by name."""

    def __init__(self, **parts: Counter) -> None:
        self._parts = parts

    def state(self) -> dict[str, Any]:
        """The state of every counter on this rank."""
        return {name: part.state() for name, part in self._parts.items()}

    def restore(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Set every counter from the states of the ranks that saved; one they did not have starts anew."""
        for name, part in self._parts.items():
            saved = [state[name] for state in states if name in state]
            if saved:
                part.restore(saved, rank, ranks)
