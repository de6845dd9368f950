"""One step: its micro-batches through the model, one exchange between the ranks, the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.data.loader import Batch
from framework.forecast.memory_advice import memory_explained
from framework.recipe.schema import Schedule
from framework.training.engine import unsharded_norm
from framework.training.meters import Meters
from framework.training.numbers import StepNumbers, Verdict
from framework.training.optim import learning_rate, resolve_schedule
from framework.training.session import Session
from framework.training.step import micro_step
from framework.watch.control import COMMANDS

__all__ = ["Agreed", "Outcome", "schedule_of", "take_step"]


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of each other once a step; the same on every rank."""

    losses: list[float]
    """Of every rank."""
    stop: int
    """The signal that asked any of them to stop, or 0."""
    command: str = ""
    """What an operator asks for, or nothing."""
    number: int = 0
    """The argument of that."""
    saving: tuple[int, int] = (0, 0)
    """How far the save in flight is (see `framework.training.saver`)."""


@dataclass(frozen=True)
class Outcome:
    """A step that was taken."""

    lr: float
    norm: Tensor | None
    """The gradients' norm under ZeRO-0; the other stages know it themselves."""
    applied: bool
    """Whether the optimizer moved the weights: it does not on gradients that are not finite."""
    agreed: Agreed
    verdict: Verdict
    numbers: StepNumbers


def schedule_of(session: Session) -> Schedule:
    """The schedule of this run, whose warm-up may be said in epochs of its data."""
    return resolve_schedule(session.recipe, {name: len(source) for name, source in session.sources.items()})


def take_step(session: Session, step: int, micro_batches: list[Batch], meters: Meters) -> Outcome:
    """Forward, backward and update, with one small exchange between the ranks beside the backward pass."""
    recipe, engine, heart, guard = session.recipe, session.engine, session.heart, session.guard
    settings = schedule_of(session)
    lr = learning_rate(step, base=recipe.optimizer.lr, steps=recipe.train.steps, schedule=settings)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    numbers = StepNumbers(session.device, len(micro_batches))
    agreed, verdict, norm, applied = Agreed([], 0), Verdict(), None, True
    with memory_explained(recipe, session.peers.world, session.device):
        for micro, batch in enumerate(micro_batches):
            last = micro == len(micro_batches) - 1
            heart.beat("forward", step, micro, {name: group.index for name, group in batch.groups.items()})
            loss = micro_step(engine, batch, recipe.data.sources, session.device, meters, numbers)
            if last and guard.refuses_spikes:
                agreed = agree(session, numbers, micro)
                verdict = guard.judge(agreed.losses)
                # All ranks alike: the optimizer drops gradients that are not finite, under every stage.
                loss = loss * torch.nan if verdict.kind else loss
            heart.beat("backward", step, micro)
            engine.backward(loss)
            if last and not guard.refuses_spikes:
                agreed = agree(session, numbers, micro)
                verdict = guard.judge(agreed.losses)
            norm = unsharded_norm(engine)
            heart.beat("update", step, micro)
            applied = update(engine, norm)
    return Outcome(lr, norm, applied, agreed, verdict, numbers)


def update(engine: Any, norm: Tensor | None) -> bool:
    """Let DeepSpeed step; whether it moved the weights. Under ZeRO-0 it would also step with NaN."""
    if norm is None or bool(norm.isfinite()):
        engine.step()
        return bool(engine.was_step_applied())
    engine.optimizer.step = lambda: None  # DeepSpeed still counts and clears the gradients
    try:
        engine.step()
    finally:
        del engine.optimizer.step
    return False


def agree(session: Session, numbers: StepNumbers, micro: int) -> Agreed:
    """Exchange what every rank has to say about this step."""
    session.heart.beat("agree", micro=micro)
    mine = (numbers.loss(), session.signals.received, *session.requests.ask(), *session.saver.flags())
    shares = session.peers.exchange([float(value) for value in mine])
    command, number = (int(value) for value in shares[0][2:4])
    return Agreed(
        losses=[share[0] for share in shares],
        stop=int(max(share[1] for share in shares)),
        command=COMMANDS[command - 1] if command else "",
        number=number,
        saving=(int(max(share[4] for share in shares)), int(max(share[5] for share in shares))),
    )
