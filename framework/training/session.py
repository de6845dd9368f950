"""What one rank works with during one attempt at a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from framework.data.ledger import Ledger
from framework.data.loader import Batch, TrainingBatches
from framework.data.plan import Plan
from framework.data.sources import OpenSource
from framework.recipe.schema import Recipe
from framework.training.distributed import Peers
from framework.training.numbers import NumbersGuard
from framework.training.requests import Requests
from framework.training.saver import Saver
from framework.training.signals import SignalFlag
from framework.training.state import TrainState
from framework.training.supervision import Supervision
from framework.training.transfer import Closable, on_device
from framework.watch.heart import Heart

__all__ = ["Session"]


@dataclass(kw_only=True)
class Session:
    """The parts of an attempt, made by `framework.training.loop.prepare`."""

    asked: Recipe
    """The recipe as the user wrote it."""
    recipe: Recipe
    """The same, fitted to this number of ranks."""
    run: Path
    device: torch.device
    peers: Peers
    signals: SignalFlag
    heart: Heart
    """Tells the sentinel of this rank where it is."""
    supervision: Supervision | None
    """Who started this attempt and may start the next; None: a person."""
    sources: dict[str, OpenSource]
    held_out: dict[str, OpenSource]
    """Held-out samples of the sources that have some."""
    plan: Plan
    loader: TrainingBatches
    """Makes the micro-batches of the steps that are left, of this rank."""
    engine: Any
    """DeepSpeed's engine; its `module` is the model."""
    state: TrainState
    saver: Saver
    start: int
    """Steps that were done when the attempt began."""
    counted: Sequence[Mapping[str, Any]]
    """What every rank had counted when the checkpoint was saved (see `framework.training.counters`)."""
    skipped: int
    """Steps that the optimizer did not apply, in this attempt and before."""
    origin: dict[str, Any] | None
    """Where the weights come from, if from another run and in this attempt."""

    done: int = field(init=False)
    """Steps that are done now."""
    batches: Closable[Batch] = field(init=False)
    """The loader's micro-batches, on the device."""
    guard: NumbersGuard = field(init=False)
    """Judges the numbers of every step."""
    ledger: Ledger = field(init=False)
    """What this rank has fed since the last checkpoint."""
    requests: Requests = field(init=False)
    """What an operator asks of this training."""

    def __post_init__(self) -> None:
        self.done = self.start
        self.batches = on_device(self.loader, self.device)
        self.guard = NumbersGuard(self.recipe)
        self.ledger = Ledger(self.start)
        self.requests = Requests(self.run, self.start, is_main=self.peers.world.is_main)
