"""The entry of a rank."""

from __future__ import annotations

import logging
from pathlib import Path

from framework.recipe.schema import Recipe
from framework.training.signals import SignalFlag
from framework.world import World

__all__ = ["train_rank"]


def train_rank(recipe: Recipe, run: Path, world: World) -> int:
    """Train as one rank of a world; returns the exit code: 0, or 128 + n when signal n asked to stop.

    Errors:
        TubeworksError: with a message for the user.
    """
    # Before torch is imported and starts threads: they inherit the mask that this sets.
    signals = SignalFlag()
    if not world.is_main:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"rank {world.rank} %(levelname)s: %(message)s"))
    import torch.distributed as dist

    from framework.training.distributed import peer_lost
    from framework.training.loop import train

    try:
        stopped_by = train(recipe, run, world, signals)
    except RuntimeError as error:
        lost = peer_lost(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 128 + stopped_by if stopped_by else 0
