"""What `test_stages` lets two ranks do: every ZeRO stage and precision in turn, in the same processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from framework.data.loader import training_batches
from framework.data.sources import build_plan, open_sources
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.training.checkpoint import CheckpointReader
from framework.training.distributed import Peers, start_process_group
from framework.training.engine import start_engine
from framework.training.meters import Meters
from framework.training.saver import save_checkpoint
from framework.training.state import TrainState
from framework.training.step import micro_step
from framework.world import World

DEVICE = torch.device("cpu")


def begin(recipe: Recipe, peers: Peers, seed: int, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """An engine and its state; other seeds give other weights."""
    torch.manual_seed(seed)
    model = build_model(recipe.model, inputs_of(recipe))
    if weights:
        model.load_state_dict(weights)
    engine = start_engine(model, recipe, peers.world)
    return engine, TrainState(engine, recipe.train.ema_decay)


def train_steps(
    recipe: Recipe, peers: Peers, engine: Any, state: TrainState, start: int, stop: int
) -> list[float]:
    """The loss of every step over all ranks."""
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    schemas = {name: opened.source for name, opened in sources.items()}
    losses = []
    for batch in training_batches(recipe, sources, plan, peers.world, start_step=start, stop_step=stop):
        meters = Meters({name: source.targets for name, source in schemas.items()}, DEVICE)
        engine.backward(micro_step(engine, batch, schemas, DEVICE, meters))
        engine.step()
        state.update_average()
        losses.append(meters.collect(peers, dict.fromkeys(schemas, 1.0))["train/loss"])
    return losses


def contents(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of all that this rank owns, by kind, parameter and place."""
    return {
        f"{kind}/{fragment.name}/{fragment.start}": tensor.clone()
        for kind in state.kinds
        for fragment, tensor in state.tensors(kind)
    }


def one_case(recipe: Recipe, peers: Peers, run: Path) -> dict[str, Any]:
    """Train, save, go on; load into other weights, go on in the same way; compare."""
    engine, state = begin(recipe, peers, seed=1)
    losses = train_steps(recipe, peers, engine, state, 0, 3)
    saved = contents(state)
    folder = save_checkpoint(run, 3, engine.module, state, peers, {"plan": ""})
    losses += train_steps(recipe, peers, engine, state, 3, 5)
    reader = CheckpointReader(folder)
    other_engine, other = begin(recipe, peers, seed=2, weights=reader.weights())
    other.restore(reader.read, reader.kinds, reader.manifest["optimizer_steps"])
    loaded = contents(other)
    again = train_steps(recipe, peers, other_engine, other, 3, 5)
    last, other_last = contents(state), contents(other)
    return {
        "losses": losses,
        "again": again,
        "kinds": state.kinds,
        "elements": sum(tensor.numel() for key, tensor in saved.items() if key.startswith("weight/")),
        "loaded_equal": saved.keys() == loaded.keys()
        and all(torch.equal(saved[key], loaded[key]) for key in saved),
        "continued_equal": all(torch.equal(last[key], other_last[key]) for key in last),
    }


def frozen_case(recipe: Recipe, peers: Peers, run: Path) -> bool:
    """Freeze a block, train a step and save: whether its weights are in the checkpoint, unchanged."""
    torch.manual_seed(1)
    model = build_model(recipe.model, inputs_of(recipe))
    frozen = {name: p for name, p in model.named_parameters() if name.startswith("blocks.0.")}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    engine = start_engine(model, recipe, peers.world)
    state = TrainState(engine, recipe.train.ema_decay)
    train_steps(recipe, peers, engine, state, 0, 1)
    saved = CheckpointReader(save_checkpoint(run, 1, engine.module, state, peers, {"plan": ""})).weights()
    return bool(before) and all(torch.equal(saved[name], values) for name, values in before.items())


def all_cases(recipe_file: str, folder: str, cases: list[tuple[int, str]]) -> int:
    """Run all cases and leave the results of this rank as JSON."""
    world = World.from_env() or World()
    peers = start_process_group(world, DEVICE)
    results = {}
    for stage, precision in cases:
        overrides = (f"engine.zero={stage}", f"engine.precision={precision}")
        recipe = load_recipe(recipe_file, overrides).recipe
        results[f"{stage}-{precision}"] = one_case(recipe, peers, Path(folder) / f"{stage}-{precision}")
        if precision == "fp32":
            # ZeRO-3 leaves parameters of less than 100,000 elements whole.
            wide = load_recipe(recipe_file, (*overrides, "model.width=256", "model.mlp_width=512")).recipe
            kept = frozen_case(wide, peers, Path(folder) / f"{stage}-frozen")
            results[f"{stage}-{precision}"]["frozen_kept"] = kept
    (Path(folder) / f"rank-{world.rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
    return 0
