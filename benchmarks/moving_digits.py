"""The variants of the TubeViT paper on moving digits: does each change point into the paper's direction?

    python -m benchmarks.moving_digits [--work DIR] [--seeds 3] [--out benchmarks/results]

Every variant is trained from several seeds with the same steps on the same batches: a seed decides the order
of the samples, their crops and the first weights. What is done is kept under `--work`, and the next call goes
on; the table is written anew after every variant, with as many seeds as there are.

One process and one thread, fp32. A step is the product's own: plan, loader, `micro_step`, losses, optimizer,
schedule, held-out evaluation; only DeepSpeed, whose start would take longer than a variant, is left out, as
in `tests/training/test_reference.py`, which holds the two to the same losses. The batches of a seed are
decoded once for all of its variants.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.moving_digits_table import LINES, write_results
from benchmarks.plain_engine import PlainEngine
from data_tools.synth import SynthOptions, synthesize
from framework.data.loader import Batch, training_batches
from framework.data.sources import build_plan, open_sources
from framework.evaluation.run import evaluate
from framework.models.registry import build_model, inputs_of
from framework.recipe import dump_yaml
from framework.recipe.schema import Recipe
from framework.training.distributed import Peers
from framework.training.initial import find_origins, load_initial
from framework.training.meters import Meters
from framework.training.optim import build_optimizer, learning_rate
from framework.training.saver import save_checkpoint
from framework.training.state import TrainState
from framework.training.step import micro_step
from framework.world import World

log = logging.getLogger("moving_digits")

STEPS, BATCH = 250, 16
CPU = torch.device("cpu")
ALONE = Peers(World(), None)

IMAGE = {"kernel": [1, 8, 8], "stride": [16, 8, 8]}
TUBES: dict[str, list[dict[str, list[int]]]] = {
    # every second frame as patches; patches and cubes at one stride (the core model of §3.4); and four in
    # the manner of Table 12, with Space-to-Depth in time, in space, and none
    "one": [{"kernel": [1, 8, 8], "stride": [2, 8, 8]}],
    "two": [{"kernel": [1, 8, 8], "stride": [4, 8, 8]}, {"kernel": [4, 8, 8], "stride": [4, 8, 8]}],
    "four": [
        {"kernel": [4, 8, 8], "stride": [8, 8, 8], "space_to_depth": [2, 1, 1]},
        {"kernel": [8, 4, 4], "stride": [4, 8, 8], "space_to_depth": [1, 2, 2]},
        {"kernel": [2, 12, 12], "stride": [8, 8, 8]},
        IMAGE,
    ],
    "four_plain": [
        {"kernel": [4, 8, 8], "stride": [8, 8, 8]},
        {"kernel": [8, 4, 4], "stride": [4, 8, 8]},
        {"kernel": [2, 12, 12], "stride": [8, 8, 8]},
        IMAGE,
    ],
}
JOINT, VIDEO, PICTURES = {"motion": BATCH, "digits": BATCH}, {"motion": BATCH}, {"digits": BATCH}
WIDTH, LARGE, DEPTH = 64, 96, 4
SOURCES = ("base", "large_images")
"""What leaves a checkpoint, for the scale-up to start from."""


def variants(work: Path, seed: int) -> dict[str, dict[str, Any]]:
    """What each variant says other than the base: keys of `model`, `mixture`, `init`, times the steps."""
    runs = {"tubes": str(work / f"base-{seed}"), "encoder": str(work / f"large_images-{seed}")}
    large = {"width": LARGE, "mlp_width": 2 * LARGE}

    def scaled(**options: Any) -> dict[str, Any]:
        return {
            "model": {**large, "scale_up": {"tube_width": WIDTH, **options}},
            "mixture": VIDEO,
            "init": runs,
        }

    return {
        "base": {},
        "one_tube": {"model": {"tubes": TUBES["one"]}},
        "two_tubes": {"model": {"tubes": TUBES["two"]}},
        "no_position": {"model": {"position": "none"}},
        "learned_position": {"model": {"position": "learned"}},
        "fixed_no_stride": {"model": {"position": "fixed_no_stride"}},
        "interpolated": {"model": {"kernels": "interpolated"}},
        "no_space_to_depth": {"model": {"tubes": TUBES["four_plain"]}},
        "video_only": {"mixture": VIDEO},
        "images_only": {"mixture": PICTURES},
        "large_images": {"model": {**large, "tubes": [IMAGE]}, "mixture": PICTURES, "longer": 4},
        "large_video": {"model": large, "mixture": VIDEO},
        "last_classifier": scaled(frozen_layers=DEPTH, gate="none"),
        "last_layers": scaled(frozen_layers=DEPTH // 2, gate="none"),
        "last_layers_gate": scaled(frozen_layers=DEPTH // 2),
        "everything": scaled(frozen_layers=0, gate="none", train_tokenizer=True),
    }


def recipe_of(name: str, variant: Mapping[str, Any], shards: Path, seed: int, steps: int) -> Recipe:
    """The whole recipe of a variant; both sources are there even where one is not trained."""
    shared = {"path": str(shards / "train"), "validation": str(shards / "val"), "size": 32}
    motion = {"flip": 0.0, "crop_area": [0.6, 1.0]}
    digits = {"flip": 0.0, "crop_area": [0.7, 1.0], "crop_ratio": [0.9, 1.1]}
    clip = {"frames": 16, "stride": 1}
    model = {"width": WIDTH, "depth": DEPTH, "heads": 4, "mlp_width": 2 * WIDTH, "tubes": TUBES["four"]}
    sources = {
        "motion": {**shared, "kind": "video", "classes": 8, "clip": clip, "augment": motion},
        "digits": {**shared, "kind": "image", "classes": 10, "augment": digits},
    }
    return Recipe.model_validate(
        {
            "name": name,
            "seed": seed,
            "model": {"name": "tubevit_ti", **model, **variant.get("model", {})},
            "init": variant.get("init"),
            "data": {"sources": sources, "mixture": variant.get("mixture", JOINT), "workers": 0},
            "optimizer": {"lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.05},
            "train": {"steps": steps},
            "schedule": {"warmup": steps // 10},
            "engine": {"zero": 0, "precision": "fp32"},
            "evaluation": {"temporal_views": 1, "spatial_views": 1, "batch": 64},
        }
    )


def train(recipe: Recipe, batches: Sequence[Batch], run: Path | None) -> dict[str, float]:
    """Train a variant on decoded batches and evaluate it; with `run`, leave a checkpoint there."""
    began = time.process_time()
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, inputs_of(recipe))
    if recipe.init is not None:
        load_initial(model, recipe, find_origins(recipe.init))
    optimizer = build_optimizer(model, recipe.optimizer)
    engine = PlainEngine(model, optimizer)
    targets = {name: recipe.data.sources[name].targets for name in recipe.data.mixture}
    meters = Meters(targets, CPU)
    for batch in batches:
        groups = {name: batch.groups[name] for name in recipe.data.mixture}
        lr = learning_rate(
            batch.step, base=recipe.optimizer.lr, steps=recipe.train.steps, schedule=recipe.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        if batch.step == recipe.train.steps * 9 // 10:
            meters.reset()
        optimizer.zero_grad()
        micro_step(engine, replace(batch, groups=groups), recipe.data.sources, CPU, meters).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or 1e9)
        optimizer.step()
    trained = meters.collect(ALONE, dict.fromkeys(recipe.data.mixture, 1.0))
    seconds = time.process_time() - began
    held_out = {
        name: opened
        for name, opened in open_sources(recipe, "validation").items()
        if name in recipe.data.mixture
    }
    model.eval()
    results = evaluate(lambda pixels: model(pixels), held_out, World(), CPU, recipe.evaluation)
    if run is not None:
        keep(recipe, run, engine)
    figures = {"cpu_seconds": seconds}
    for name, result in results.items():
        figures |= {f"{name}/top_1": result.metrics()["top_1"], f"{name}/loss": result.metrics()["loss"]}
        figures[f"{name}/training_loss"] = trained[f"train/{name}/loss"]
    if getattr(model, "gate", None) is not None:
        figures["tanh_alpha"] = float(torch.tanh(model.gate.alpha.detach()).mean())  # type: ignore[union-attr]
    return figures


def keep(recipe: Recipe, run: Path, engine: PlainEngine) -> None:
    """A run folder that `init` can name: the recipe and a checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    state = TrainState(engine, None)
    facts = {"recipe": recipe.name, "plan": "", "zero": 0, "precision": "fp32", "skipped_steps": 0}
    save_checkpoint(run, recipe.train.steps, engine.module, state, ALONE, facts)


def decoded_batches(recipe: Recipe) -> list[Batch]:
    """All micro-batches of a recipe, from the loader."""
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    return list(training_batches(recipe, sources, plan, World(), start_step=0, stop_step=recipe.train.steps))


def main() -> None:
    """Make the shards, train what is missing, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("moving_digits"), help="shards and finished variants"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="*", help="variants, by default all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    shards = options.work / "shards"
    if not shards.exists():
        synthesize(SynthOptions(shards, train_videos=2048, val_videos=512, train_images=2048, val_images=512))
    for seed in range(options.seeds):
        batches: list[Batch] = []
        for name, variant in variants(options.work, seed).items():
            path = options.work / f"{name}-{seed}.json"
            if path.exists() or (options.only and name not in options.only):
                continue
            recipe = recipe_of(name, variant, shards, seed, options.steps * variant.get("longer", 1))
            if recipe.train.steps == options.steps:
                batches = batches or decoded_batches(recipe_of("base", {}, shards, seed, options.steps))
            its = batches if recipe.train.steps == options.steps else decoded_batches(recipe)
            figures = train(recipe, its, options.work / f"{name}-{seed}" if name in SOURCES else None)
            path.write_text(json.dumps({"variant": name, "seed": seed, **figures}, indent=1) + "\n")
            log.info("%s, seed %d: %s", name, seed, {k: round(v, 3) for k, v in figures.items()})
            write_results(options.work, options.out, options.steps, LINES)


if __name__ == "__main__":
    main()
