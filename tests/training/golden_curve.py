"""The loss curve that `test_golden` compares with a file: 200 steps of a small joint model on the CPU.

    python tests/training/golden_curve.py           # writes golden/loss_curve.json anew

It has to be written anew only by a change that is meant to change what training computes. Pixels are made by
integer arithmetic, without codecs, so that they are the same everywhere.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.training.meters import Meters
from framework.training.optim import build_optimizer, learning_rate
from framework.training.step import micro_step

GOLDEN = Path(__file__).parent / "golden" / "loss_curve.json"
STEPS = 200
RECIPE = """\
name: golden
seed: 11
model:
  name: tubevit_ti
  width: 48
  depth: 3
  heads: 3
  mlp_width: 96
  tubes:
    - {kernel: [4, 8, 8], stride: [4, 8, 8], space_to_depth: [2, 1, 1]}
    - {kernel: [1, 8, 8], stride: [10, 8, 8]}
  stochastic_depth: 0.1
  dropout: 0.1
data:
  sources:
    motion:
      {path: none, kind: video, classes: 4, size: 16, clip: {frames: 10, stride: 1}, label_smoothing: 0.1}
    bars: {path: none, kind: image, classes: 2, size: 16, mixup: 0.2, loss_weight: 0.5}
  mixture: {motion: 16, bars: 8}
optimizer: {lr: 2e-3, weight_decay: 0.05}
schedule: {warmup: 20}
train: {steps: 200}
engine: {precision: fp32}
"""


def golden_recipe(folder: Path) -> Recipe:
    """The recipe of the curve."""
    path = folder / "golden.yaml"
    path.write_text(RECIPE)
    return load_recipe(str(path)).recipe


class Alone:
    """A model where a step expects DeepSpeed's engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = model

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)


def curve(recipe: Recipe) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, inputs_of(recipe))
    optimizer = build_optimizer(model, recipe.optimizer)
    sources, device = recipe.data.sources, torch.device("cpu")
    meters = Meters({name: source.targets for name, source in sources.items()}, device)
    losses = []
    for step in range(recipe.train.steps):
        loss = micro_step(Alone(model), batch_of(recipe, step), sources, device, meters)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or 1e9)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, base=recipe.optimizer.lr, steps=recipe.train.steps, schedule=recipe.schedule
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def batch_of(recipe: Recipe, step: int) -> Any:
    """Bars that move in one of four directions, and bars that stand or lie, on noise."""
    random = np.random.Generator(np.random.Philox(key=step))
    groups = {}
    for name, count in recipe.data.mixture.items():
        source = recipe.data.sources[name]
        labels = random.integers(source.classes, size=count)
        pixels = random.integers(64, size=(count, 3, source.frames, source.size, source.size), dtype=np.uint8)
        starts = random.integers(source.size, size=count)
        for row, (label, start) in enumerate(zip(labels, starts, strict=True)):
            for frame in range(source.frames):
                place = (start + (frame if label < 2 else -frame)) % source.size
                line = pixels[row, :, frame, place, :] if label % 2 else pixels[row, :, frame, :, place]
                line += 160
        groups[name] = SimpleNamespace(
            pixels=torch.from_numpy(pixels),
            labels=torch.from_numpy(labels.astype(np.int64)),
            seeds=torch.from_numpy(random.integers(2**62, size=count)),
        )
    return cast(Any, SimpleNamespace(groups=groups))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        losses = [round(loss, 6) for loss in curve(golden_recipe(Path(temporary)))]
    text = {"torch": torch.__version__, "losses": losses}
    GOLDEN.write_text(json.dumps(text, indent=0) + "\n")
    print(losses[:3], losses[-3:])
