"""What `test_elastic` lets some ranks do: go on with a checkpoint under every ZeRO stage in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from stage_worker import DEVICE, begin, train_steps

from framework.recipe import load_recipe
from framework.training.checkpoint import CheckpointReader
from framework.training.distributed import Peers, start_process_group
from framework.training.saver import save_checkpoint
from framework.world import World

MIXTURE = (
    *("data.mixture.motion=12", "data.mixture.digits=12", "data.sources.digits.mixup=0"),
    *("schedule.name=constant", "schedule.warmup=0"),
)
"""Divides by 1, 2, 3 and 4 ranks, which pairs for mixup would not; and a learning rate that nobody sets."""


def one_stage(recipe_file: str, source: Path, run: Path, stage: int, peers: Peers) -> dict[str, Any]:
    """Restore, save at once and compare every bit, then train three steps."""
    recipe = load_recipe(recipe_file, [*MIXTURE, f"engine.zero={stage}"]).recipe
    reader = CheckpointReader(source)
    engine, state = begin(recipe, peers, seed=stage, weights=reader.weights())
    state.restore(reader.read, reader.kinds, reader.manifest["optimizer_steps"])
    folder = save_checkpoint(run, 3, engine.module, state, peers, {"plan": ""})
    peers.gather(None)
    again = CheckpointReader(folder)
    unequal, tensors = [], 0
    for kind in sorted(reader.kinds | again.kinds):
        ours, theirs = again.weights(kind), reader.weights(kind)
        tensors += len(theirs)
        names = ours.keys() | theirs.keys()
        unequal += [
            f"{kind} {name}"
            for name in names
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
        ]
    losses = train_steps(recipe, peers, engine, state, 3, 6)
    return {"folder": str(folder), "unequal": unequal, "tensors": tensors, "losses": losses}


def all_stages(recipe_file: str, source: str, folder: str) -> int:
    """Stages 1, 2 and 3, each with what the one before wrote; rank 0 leaves the results as JSON."""
    world = World.from_env() or World()
    peers = start_process_group(world, DEVICE)
    results = {}
    place = Path(source)
    for stage in (1, 2, 3):
        name = f"{world.size}-{stage}"
        results[name] = one_stage(recipe_file, place, Path(folder) / name, stage, peers)
        place = Path(results[name]["folder"])
    if world.is_main:
        (Path(folder) / f"ranks-{world.size}.json").write_text(json.dumps(results))
    peers.gather(None)
    torch.distributed.destroy_process_group()
    return 0
