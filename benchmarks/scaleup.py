"""What freezing the first layers saves in a scale-up (TubeViT §3.6): time, operations, optimizer memory.

    python -m benchmarks.scaleup [--out benchmarks/results/scaleup.json] [--rounds 12] [--width 256]

Trains a model of H's depth on noise, once with everything trained and once for each number of frozen layers;
a step is the product's own (`micro_step`, optimizer, gate). Rounds go through all of them in turn, so that
whatever else the machine does meets all alike, and a ratio is taken inside its round. Operations are counted
by torch as they run; those of the recipe `tubevit_h_scaleup_k600` on fake tensors, which compute nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_engine import PlainEngine
from framework.data.loader import Batch, Group
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.training.meters import Meters
from framework.training.optim import build_optimizer
from framework.training.step import micro_step

H_RECIPE = "tubevit_h_scaleup_k600"
FROZEN = (8, 16, 24, 26, 28)
DEPTH = 32
WARM = 2


@dataclass
class Trainee:
    """A model in training, and what its steps took."""

    recipe: Recipe
    model: nn.Module
    optimizer: torch.optim.Optimizer
    before: dict[str, Tensor]
    cpu_seconds: list[float]
    wall_seconds: list[float]


def recipe_of(width: int, frozen: int | None) -> Recipe:
    """The tubes of the paper on clips of 32 frames of 96 pixels; None: everything is trained."""
    scale_up: dict[str, Any] = {"tube_width": 3 * width // 5 // 8 * 8, "frozen_layers": frozen or 0}
    if frozen is None:
        scale_up |= {"gate": "none", "train_tokenizer": True}
    source = {
        "path": "none",
        "kind": "video",
        "classes": 600,
        "size": 96,
        "clip": {"frames": 32, "stride": 1},
    }
    size = {"width": width, "depth": DEPTH, "heads": 4, "mlp_width": 4 * width}
    return Recipe.model_validate(
        {
            "name": "scaleup",
            "model": {"name": "tubevit_h", **size, "scale_up": scale_up},
            "init": {"tubes": "none", "encoder": "none"},
            "data": {"sources": {"clips": source}, "mixture": {"clips": 4}},
            "optimizer": {"lr": 1e-4, "weight_decay": 1e-5},
            "train": {"steps": 1},
        }
    )


def start(recipe: Recipe) -> Trainee:
    """A model with random weights: what is trained, not what is learned, is looked at."""
    torch.manual_seed(0)
    model = build_model(recipe.model, inputs_of(recipe))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Trainee(recipe, model, build_optimizer(model, recipe.optimizer), before, [], [])


def noise(recipe: Recipe, step: int) -> Batch:
    """A micro-batch of clips of noise."""
    (name, source), (count,) = next(iter(recipe.data.sources.items())), recipe.data.mixture.values()
    generator = torch.Generator().manual_seed(step)
    shape = (count, 3, source.frames, source.size, source.size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, source.classes, (count,), generator=generator)
    numbers = torch.arange(count)
    group = Group(pixels, labels, index=numbers, epoch=numbers, planned=numbers, seeds=numbers)
    return Batch(step, 0, {name: group})


def one_step(trainee: Trainee, step: int) -> None:
    """Forward, backward, update."""
    batch, sources = noise(trainee.recipe, step), trainee.recipe.data.sources
    meters = Meters({name: source.targets for name, source in sources.items()}, torch.device("cpu"))
    trainee.model.train()
    wall, cpu = time.perf_counter(), time.process_time()
    trainee.optimizer.zero_grad()
    micro_step(
        PlainEngine(trainee.model, trainee.optimizer), batch, sources, torch.device("cpu"), meters
    ).backward()
    trainee.optimizer.step()
    trainee.cpu_seconds.append(time.process_time() - cpu)
    trainee.wall_seconds.append(time.perf_counter() - wall)


def operations(model: nn.Module, recipe: Recipe) -> int:
    """Floating point operations of forward and backward of one clip, a multiply-add as two."""
    name, source = next(iter(recipe.data.sources.items()))
    shape = (1, 3, source.frames, source.size, source.size)
    pixels = torch.zeros(shape, dtype=torch.uint8)
    # the fused kernels of attention are unknown to torch's counter on this device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model({name: pixels})[name].sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def figures_of(trainee: Trainee, full: Trainee, flops: int, full_flops: int) -> dict[str, Any]:
    """What one number of frozen layers saves against training everything."""
    frozen = {name: p for name, p in trainee.model.named_parameters() if not p.requires_grad}
    same = sum(torch.equal(p, trainee.before[name]) for name, p in frozen.items())
    return {
        "frozen_tensors": len(frozen),
        "frozen_tensors_bit_identical": same,
        "frozen_tensors_with_gradient": sum(p.grad is not None for p in frozen.values()),
        "optimizer_bytes": optimizer_bytes(trainee.optimizer),
        "optimizer_bytes_of_full": optimizer_bytes(full.optimizer),
        "flops_ratio": round(flops / full_flops, 4),
        "cpu_time_ratio": spread(trainee.cpu_seconds[WARM:], full.cpu_seconds[WARM:]),
        "wall_time_ratio": spread(trainee.wall_seconds[WARM:], full.wall_seconds[WARM:]),
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that the optimizer keeps."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def spread(seconds: list[float], of: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios inside each round."""
    ratios = [one / other for one, other in zip(seconds, of, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def whole_h() -> dict[str, Any]:
    """Operations and memory of the recipe for H with some layers frozen, against all of it."""
    result: dict[str, Any] = {}
    full = 0, 0
    for frozen in (None, *FROZEN):
        scale_up = f"model.scale_up.frozen_layers={frozen or 0}"
        whole = ["model.scale_up.gate=none", "model.scale_up.train_tokenizer=true"] if frozen is None else []
        recipe = load_recipe(H_RECIPE, [scale_up, *whole]).recipe
        with torch.device("meta"):
            model = build_model(recipe.model, inputs_of(recipe))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with FakeTensorMode(allow_non_fake_inputs=True):
            flops = operations(model.to_empty(device="cpu"), recipe)
        if frozen is None:
            full = flops, trained
        # two moments and the fp32 copy of bf16 weights, and fp32 gradients
        gigabytes = trained * (8 + 4 + 4) / 1e9
        result["full" if frozen is None else f"frozen_{frozen}"] = {
            "gflop_per_clip": round(flops / 1e9, 1),
            "flops_ratio": round(flops / full[0], 4),
            "trained_parameters": trained,
            "optimizer_and_gradients_gb": round(gigabytes, 2),
            "memory_ratio": round(trained / full[1], 4),
        }
    return result


def main() -> None:
    """Measure, count, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaleup.json"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainees = {frozen: start(recipe_of(options.width, frozen)) for frozen in (None, *FROZEN)}
    for step in range(WARM + options.rounds):
        for trainee in trainees.values():
            one_step(trainee, step)
    full = trainees[None]
    flops = {frozen: operations(t.model, t.recipe) for frozen, t in trainees.items()}
    measured = {
        f"frozen_{frozen}": figures_of(trainee, full, flops[frozen], flops[None])
        for frozen, trainee in trainees.items()
        if frozen is not None
    }
    content = {
        "command": f"python -m benchmarks.scaleup --rounds {options.rounds} --width {options.width}",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "published": {"training_time_ratio": 0.57, "source": "arXiv 2212.03229, §4: -43 % training time"},
        "model": {
            "width": options.width,
            "depth": DEPTH,
            "clip": "32 x 96 x 96",
            "clips_per_step": 4,
            "threads": 1,
            "precision": "fp32",
            "rounds": options.rounds,
            "full_step_cpu_seconds": round(statistics.median(full.cpu_seconds[WARM:]), 4),
            "full_step_gflop": round(4 * flops[None] / 1e9, 2),
        },
        "measured": measured,
        H_RECIPE: whole_h(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
