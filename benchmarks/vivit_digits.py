"""A learning table on moving digits: ViViT's models and the average-pool baseline, and VideoMAE against none.

    python benchmarks/vivit_digits.py [--cells m1,m2 --seeds 0,1,2 --seconds 25] [--out benchmarks/results/…]

The task is to tell in which of 4 directions a digit moves. Tubelets are one frame deep, so that order in time
can only be seen by attention over time: reversed frames are the opposite direction and the same set of
frames. A model that does not look at order can tell the axis at best, which is right half of the time.

Every cell trains for the same CPU time, by itself, on one thread. VideoMAE's cells share it: one trains its
classifier alone, the other spends half of the time on pretraining without labels.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from data_tools.synth import MotionClip
from framework.models import InputSpec, build_model
from framework.models.joint import JointModel
from framework.recipe.model_sections import ModelSection

DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1))
CANVAS, FRAMES, BATCH = 16, 5, 32
INPUTS = {"clips": InputSpec("video", FRAMES, CANVAS, len(DIRECTIONS))}
SIZE = {"width": 64, "depth": 2, "heads": 4}
VIVIT = {**SIZE, "tubelet": [1, 8, 8]}
MAE = {**SIZE, "name": "videomae_ti", "tubelet": [1, 8, 8]}
CELLS: dict[str, dict[str, Any]] = {
    **{name: {**VIVIT, "name": f"vivit_ti_{name}"} for name in ("m1", "m2", "m3", "m4", "avgpool")},
    "videomae from scratch": MAE,
    "videomae pretrained": MAE,
}


class Clips:
    """Clips of handwritten digits that move, drawn before time counts; each part has digits of its own."""

    def __init__(self, seed: int, part: str, count: int = 6000) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits(return_X_y=True)[0].reshape(-1, 8, 8).astype(np.uint8)
        digits = digits[::5] if part == "held out" else np.delete(digits, np.s_[::5], axis=0)
        self.random = np.random.default_rng([seed, part == "held out"])
        self.labels = torch.from_numpy(self.random.integers(0, len(DIRECTIONS), count))
        self.clips = torch.from_numpy(np.stack([self._draw(digits, DIRECTIONS[n]) for n in self.labels]))

    def _draw(self, digits: np.ndarray, direction: tuple[int, int]) -> np.ndarray:
        """From one side of the canvas to the other, somewhere across."""
        room = CANVAS // 2  # a digit fills the other half
        across = int(self.random.integers(room + 1))
        place = tuple({1: 0, -1: room, 0: across}[way] for way in direction)
        pixels = digits[self.random.integers(len(digits))].tobytes()
        step = (direction[0] * room // (FRAMES - 1), direction[1] * room // (FRAMES - 1))
        return MotionClip(pixels, CANVAS, FRAMES, (place[0], place[1]), step).draw()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """uint8 (size, 3, frames, side, side), and the directions."""
        chosen = torch.from_numpy(self.random.integers(0, len(self.labels), size))
        return self.clips[chosen].unsqueeze(1).expand(-1, 3, -1, -1, -1), self.labels[chosen]


def make(section: dict[str, Any]) -> JointModel:
    """The model of a section with random weights."""
    model = build_model(TypeAdapter(ModelSection).validate_python(section), INPUTS)
    assert isinstance(model, JointModel)
    return model


def train(model: JointModel, data: Clips, seconds: float, loss: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Train for so much CPU time; returns the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    began, step = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 10 * spent / seconds, 2 * (1 - spent / seconds) + 0.02)
        clips, labels = data.batch(BATCH)
        step += 1
        value = loss(model({"clips": clips}, {"clips": torch.arange(BATCH) + BATCH * step})["clips"], labels)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


@torch.no_grad()
def accuracy(model: JointModel, seed: int) -> tuple[float, float]:
    """Of held-out clips, and of the same with their frames shuffled."""
    model.eval()
    clips, labels = Clips(seed, "held out", 1000).batch(512)
    order = torch.from_numpy(
        np.random.default_rng(seed).permuted(np.tile(np.arange(FRAMES), (512, 1)), axis=1)
    )
    shuffled = clips.gather(2, order.view(512, 1, FRAMES, 1, 1).expand_as(clips))
    right = [
        float(
            (torch.cat([model({"clips": part})["clips"] for part in some.split(64)]).argmax(1) == labels)
            .float()
            .mean()
        )
        for some in (clips, shuffled)
    ]
    return right[0], right[1]


def run_cell(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """One model, one seed."""
    torch.manual_seed(seed)
    data, model = Clips(seed, "train"), make(CELLS[name])
    before = 0
    if name == "videomae pretrained":
        masked = make({**CELLS[name], "pretrain": {"ratio": 0.75, "decoder_depth": 1, "decoder_heads": 2}})
        before = train(masked, data, seconds / 2, lambda losses, _: losses.mean())
        own = model.state_dict()
        learned = {key: part for key, part in masked.state_dict().items() if key in own}
        model.load_state_dict(learned, strict=False)
    share = 0.5 if before else 1.0
    steps = train(model, data, seconds * share, F.cross_entropy)
    right, shuffled = accuracy(model, seed)
    return {
        "cell": name,
        "seed": seed,
        "steps": steps,
        "pretraining_steps": before,
        "top_1": right,
        "shuffled": shuffled,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and deviation over the seeds."""
    lines = [f"{'model':<24}{'top-1':>14}{'shuffled':>10}{'steps':>8}"]
    for name in dict.fromkeys(row["cell"] for row in rows):
        mine = [row for row in rows if row["cell"] == name]
        scores = [100 * row["top_1"] for row in mine]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        shuffled = statistics.mean(100 * row["shuffled"] for row in mine)
        steps = statistics.mean(row["steps"] for row in mine)
        lines.append(
            f"{name:<24}{statistics.mean(scores):>8.1f} ±{spread:>4.1f}{shuffled:>10.1f}{steps:>8.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the cells and write the table, and with `--out` all figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=25.0, help="CPU time of each cell")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.cells.split(","):
        for seed in map(int, options.seeds.split(",")):
            rows.append(run_cell(name, seed, options.seconds))
            sys.stderr.write(json.dumps(rows[-1]) + "\n")
    sys.stdout.write(table(rows) + "\n")
    if options.out:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        result = {
            "seconds": options.seconds,
            "machine": machine,
            "table": table(rows).splitlines(),
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
