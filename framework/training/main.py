"""The entry of a rank."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.errors import TubeworksError
from framework.recipe.schema import Recipe
from framework.training.signals import HANDLED, SignalFlag
from framework.training.supervision import GOES_ON, Supervision
from framework.watch.heart import Heart, start_heart
from framework.world import World

__all__ = ["train_rank"]

SHOWN = 32


def train_rank(recipe: Recipe, run: Path, world: World, supervision: Supervision | None = None) -> int:
    """Train as one rank of a world; returns the exit code.

    0: done; `GOES_ON`: saved on a signal, and the supervisor will start the run again; 128 + n: signal n
    asked to stop, and nobody will.

    Errors:
        TubeworksError: with a message for the user.
    """
    # The heart's sentinel is forked, so it comes before there are threads, and it must not die of a Ctrl-C.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    heart = start_heart(
        run,
        recipe.guards.hang_seconds,
        world.rank,
        world.size,
        lambda record: samples_of(recipe, world, record),
    )

    def leaving(number: int) -> None:
        # It writes down that a person wants an end. In a job it would ask Slurm, which can take long.
        if supervision is not None and supervision.by_people and world.is_main:
            supervision.goes_on(number)
        heart.left(number)

    # Before torch is imported and starts threads: they inherit the mask that this sets.
    early = supervision is None or supervision.by_people
    signals = SignalFlag(leaving, leaves_early=early, speaks=world.is_main)
    heart.start()
    if not world.is_main:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"rank {world.rank} %(levelname)s: %(message)s"))
    try:
        return _train(recipe, run, world, signals, heart, supervision)
    finally:
        heart.end()
        signals.end()


def _train(
    recipe: Recipe,
    run: Path,
    world: World,
    signals: SignalFlag,
    heart: Heart,
    supervision: Supervision | None,
) -> int:
    import torch.distributed as dist

    from framework.training.distributed import peer_lost
    from framework.training.loop import train

    try:
        stopped_by, goes_on = train(recipe, run, world, signals, heart, supervision)
    except RuntimeError as error:
        lost = peer_lost(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if goes_on:
        return GOES_ON
    return 128 + stopped_by if stopped_by else 0


def samples_of(recipe: Recipe, world: World, record: Mapping[str, Any]) -> list[str]:
    """The samples that a rank was at, for a post-mortem: source, index, key, shard and offset of each.

    Of a rank that waited for its data these are the ones of the plan.
    """
    from framework.data.sources import build_plan, open_sources

    indices: dict[str, list[int]] = record["samples"]
    try:
        sources = open_sources(recipe, "train")
        if record["phase"] == "data":
            share = build_plan(recipe, sources).share(
                record["step"],
                rank=record["rank"],
                world=world.size,
                micro=record["micro"],
                accumulation=recipe.train.accumulation,
            )
            indices = {name: ids.index.tolist() for name, ids in share.items()}
        lines = []
        for name, numbers in indices.items():
            for number in numbers[:SHOWN]:
                info = sources[name].manifest.sample(int(sources[name].selection[number]))
                lines.append(f"{name} {number}: {info.key} in {info.shard} at {info.offset}")
            if len(numbers) > SHOWN:
                lines.append(f"{name}: and {len(numbers) - SHOWN} more")
        return lines
    except (TubeworksError, OSError, ValueError) as error:
        named = [f"{name} {' '.join(map(str, numbers[:SHOWN]))}" for name, numbers in indices.items()]
        return [*named, f"(their keys cannot be looked up: {error})"]
