"""Evaluation on the held-out shards during and after training, with the weights as they are."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from framework.evaluation.run import AnyResult, evaluate
from framework.recipe.model_sections import reconstructs
from framework.training.agreement import agreed_signal
from framework.training.session import Session

__all__ = ["evaluate_held_out"]


class _Stopped(Exception):
    """A signal asked to stop; every rank raises this before the same batch."""


def evaluate_held_out(session: Session) -> dict[str, AnyResult]:
    """Every held-out sample of every source that names a `validation` folder, once.

    Empty without such a source, for a model without classifiers, and when a signal broke the evaluation off:
    a scheduler that wants the nodes back does not wait for it.
    """
    if not session.held_out or reconstructs(session.recipe.model):
        return {}
    model = session.engine.module

    @torch.no_grad()
    def forward(pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        session.heart.beat("evaluate")
        if agreed_signal(session):
            raise _Stopped
        return model(pixels)

    model.eval()
    # Its shapes are not those of training, and some occur once: not worth compiling for.
    compiling = session.recipe.train.compile
    try:
        with torch.compiler.set_stance("eager_on_recompile") if compiling else nullcontext():
            return evaluate(
                forward,
                session.held_out,
                session.peers.world,
                session.device,
                session.recipe.evaluation,
                workers=session.recipe.data.workers,
            )
    except _Stopped:
        return {}
    finally:
        model.train()
