"""The table of `benchmarks.moving_digits`: what the paper says, what was seen, and whether they agree."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["LINES", "Line", "write_results"]


@dataclass(frozen=True)
class Line:
    """A claim of the paper: that `better` has a higher accuracy on a source than `worse`."""

    group: str
    claim: str
    better: str
    worse: str
    published: str
    source: str = "motion"


LINES = (
    Line("tubes", "two tubes over one", "two_tubes", "one_tube", "81.5 / 78.4 (Table 7)"),
    Line("tubes", "four tubes over two", "base", "two_tubes", "83.4 / 81.5 (Table 7)"),
    Line("positions", "fixed over none", "base", "no_position", "84.5 / 78.6 (Table 7a)"),
    Line("positions", "fixed over learned", "base", "learned_position", "84.5 / 79.2 (Table 7a)"),
    Line("positions", "fixed over fixed without stride", "base", "fixed_no_stride", "84.5 / 77.7 (Table 7a)"),
    Line("positions", "learned over none", "learned_position", "no_position", "79.2 / 78.6 (Table 7a)"),
    Line("kernels", "independent over interpolated", "base", "interpolated", "84.5 / 83.8 (Table 7e)"),
    Line("Space-to-Depth", "with over without", "base", "no_space_to_depth", "84.7 / 83.4 (Table 7c)"),
    Line("joint training", "videos: joint over videos alone", "base", "video_only", "91.5 / 85.6 (Table 5)"),
    Line(
        "joint training",
        "images: joint over images alone",
        "base",
        "images_only",
        "81.4 / 78.1 (§3.5, ImageNet-1k)",
        "digits",
    ),
    Line("scale-up", "last layers over head", "last_layers", "last_classifier", "86.8 / 85.6 (Table 6)"),
    Line("scale-up", "gate over no gate", "last_layers_gate", "last_layers", "89.7 / 86.8 (Table 6)"),
    Line("scale-up", "everything over gate", "everything", "last_layers_gate", "91.8 / 89.7 (Table 6)"),
    Line("scale-up", "gate over from scratch", "last_layers_gate", "large_video", "no such line there"),
)

INTRODUCTION = """\
# The paper's variants on moving digits

`python -m benchmarks.moving_digits`: {steps} steps of 16 clips and 16 images, the same batches for all
variants of a seed; held-out top-1 of 512 samples, mean over the seeds (lowest to highest). *yes*:
better in every seed; *no*: worse in every seed. `moving_digits.json` has every run.

What to make of it: the model has 4 layers of width 64 (96 in the scale-up), learns for half a minute,
and the task is motion and nothing else. A line shows which variant learns faster here, not where it
ends. One that points the other way says little about Kinetics; one that agrees says that the code can
show it. One, two and four tubes make 128, 128 and 114 tokens of a clip of 16 frames; the two have the
shorter stride in time (4 frames against 8), so the line of four over two compares more than their
number. Seeds of the base lie far apart, because all of this happens where accuracy rises steeply.

How it was set up, looking at seed 0 alone, which is therefore no independent one: with 400 steps the
base is at 99.8 % or more and nothing can differ; with RandAugment and crops down to 0.4 of the area,
the four tubes stay at chance for 400 steps (14.5 %, and 16.2 % without positions), where the two tubes
reach 81.6 %; with 200 steps and crops down to 0.9, the base has 75.8 % and 75.0 % without positions. So
{steps} steps, no RandAugment, crops down to 0.6. The scale-up takes its tubes from the base, and its
encoder from a model of images that trained four times as long, since both are meant to be trained
already. A first try, with the tubes of a smaller model that had learned next to nothing (24.6 %) and an
image model trained as long as the rest, was given up after its first fine-tuning (the classifier alone:
35.4 %).

| | the paper says | published | with | without | gain | seeds | direction reproduced |
|---|---|---|---|---|---|---|---|"""

Figures = dict[str, dict[int, dict[str, float]]]
"""Of each variant, by seed."""


def write_results(work: Path, out: Path, steps: int, lines: Sequence[Line]) -> None:
    """Write `moving_digits.json` and `moving_digits.md` from the variants that are finished."""
    found = read_figures(work)
    rows = [row for line in lines if (row := compare(line, found)) is not None]
    content = {
        "command": "python -m benchmarks.moving_digits",
        "steps": steps,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "lines": rows,
        "variants": {name: {str(seed): f for seed, f in seeds.items()} for name, seeds in found.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "moving_digits.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "moving_digits.md").write_text(as_text(rows, found, steps), encoding="utf-8")


def read_figures(work: Path) -> Figures:
    """What `benchmarks.moving_digits` has finished."""
    found: Figures = {}
    for path in sorted(work.glob("*-[0-9]*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        figures = {key: value for key, value in content.items() if key not in ("variant", "seed")}
        found.setdefault(content["variant"], {})[content["seed"]] = figures
    return found


def compare(line: Line, found: Figures) -> dict[str, Any] | None:
    """Both sides of a claim on the seeds that both have, and what they say; None without any.

    Reproduced: better in every seed. Not reproduced: worse in every seed. Otherwise the seeds do not tell.
    """
    better, worse = found.get(line.better, {}), found.get(line.worse, {})
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return None
    key = f"{line.source}/top_1"
    one, other = [better[seed][key] for seed in seeds], [worse[seed][key] for seed in seeds]
    gains = [a - b for a, b in zip(one, other, strict=True)]
    if all(gain > 0 for gain in gains):
        verdict = "yes"
    else:
        verdict = "no" if all(gain < 0 for gain in gains) else "the seeds disagree"
    return {
        "group": line.group,
        "claim": line.claim,
        "published": line.published,
        "source": line.source,
        "seeds": seeds,
        "better": summary(one),
        "worse": summary(other),
        "gain": summary(gains),
        "reproduced": verdict if len(seeds) > 1 else f"one seed: {verdict}",
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the smallest and the largest of the seeds."""
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def as_text(rows: Sequence[dict[str, Any]], found: Figures, steps: int) -> str:
    """The table for people."""
    head = [INTRODUCTION.format(steps=steps)]
    for row in rows:
        cells = (_share(row["better"]), _share(row["worse"]), _share(row["gain"], sign=True))
        head.append(
            f"| {row['group']} | {row['claim']} | {row['published']} | {' | '.join(cells)} |"
            f" {len(row['seeds'])} | {row['reproduced']} |"
        )
    head += ["", "| variant | motion | digits | seeds | processor seconds |", "|---|---|---|---|---|"]
    for name, seeds in found.items():
        sources = []
        for source in ("motion", "digits"):
            values = [
                figures[f"{source}/top_1"] for figures in seeds.values() if f"{source}/top_1" in figures
            ]
            sources.append(_share(summary(values)) if values else "")
        seconds = statistics.fmean(figures["cpu_seconds"] for figures in seeds.values())
        head.append(f"| {name} | {' | '.join(sources)} | {len(seeds)} | {seconds:.0f} |")
    return "\n".join(head) + "\n"


def _share(values: dict[str, float], *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    mean, low, high = (format(100 * values[key], f"{plus}.1f") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
