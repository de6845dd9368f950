"""Evaluation on the held-out shards during and after training, with the weights as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.evaluation.run import SourceResult, evaluate
from framework.training.session import Session

__all__ = ["evaluate_held_out"]


def evaluate_held_out(session: Session) -> dict[str, SourceResult]:
    """Every held-out sample of every source that names a `validation` folder, once; empty without one."""
    if not session.held_out:
        return {}
    model = session.engine.module

    @torch.no_grad()
    def forward(pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        return model(pixels)

    model.eval()
    try:
        return evaluate(
            forward,
            session.held_out,
            session.peers.world,
            session.device,
            session.recipe.evaluation,
            workers=session.recipe.data.workers,
        )
    finally:
        model.train()
