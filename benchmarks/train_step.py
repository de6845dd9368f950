"""The training step against the chip and against what people would use instead, in one run.

    python -m benchmarks.train_step [--out FILE] [--seconds 440] [--tiny]        (make bench-gpu)

Measures the rate of a large bf16 matrix product, and then, as shares of that rate, forward passes and full
DeepSpeed steps of TubeViT-B, L and H with 539, 735 and 1176 tokens, with and without compilation, activation
checkpointing and images beside the clips; the steps of other libraries' ViTs of the same shape; three
tokenizers; the kernels of attention; the joint pass against two passes and against padding; a frozen prefix
against full training; and the largest micro-batches. Needs torch, deepspeed, numpy, pydantic, ruamel.yaml and
rich, and a CUDA GPU; pixels are random, so it needs no data. `--tiny` runs every part with a tiny model, on a
CPU too. Each figure is printed, and written to FILE, as soon as it is there.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import sections
from benchmarks.step.product import Setting
from benchmarks.step.sections import Bench
from benchmarks.step.timing import Budget, Workbench
from framework.training.distributed import choose_device, start_process_group
from framework.world import World

SECONDS = 440.0
GRACE = 30.0
"""Seconds beyond that after which a run that hangs is ended."""
SECTIONS = ("steps", "rivals", "tokenizers", "attention", "joint", "frozen", "largest")
FORMAT = "tubeworks-train-step"


@dataclass(frozen=True)
class Goal:
    """What a figure should reach."""

    name: str
    wanted: str
    value: float | None
    reached: bool | None


def main() -> None:
    """Measure, print a summary, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, help="JSON file for the results; a profile goes beside it as .txt"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="wall clock for all of it")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.tiny):
        sys.exit("there is no CUDA GPU here; `--tiny` runs all parts with a tiny model on the CPU")
    # A driver that hangs must not keep the machine: what is measured is in the file already.
    faulthandler.dump_traceback_later(options.seconds + GRACE, exit=True)
    results = measure(options.seconds, tiny=options.tiny, out=options.out)
    print(summary(results))


def measure(seconds: float, *, tiny: bool, out: Path | None = None) -> dict[str, Any]:
    """Run every section within so many seconds; what did not fit is listed under `skipped`.

    Each row is printed, and the file written anew, as soon as it is there: a run that is cut off leaves what
    it has measured. A section that breaks is listed under `broken`, and the next one begins.
    """
    device = choose_device(World())
    start_process_group(World(), device)
    workbench = Workbench(device, warmup=1, repeats=2, settle=0.0) if tiny else Workbench(device)
    bench = Bench(Setting(device, tiny), workbench, Budget(seconds))
    results: dict[str, Any] = {
        "format": FORMAT,
        "command": " ".join(["python -m benchmarks.train_step", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _device(workbench),
        "versions": _versions(),
        "complete": False,
        "ceiling": (top := sections.ceiling(bench)),
        **{name: [] for name in SECTIONS},
        "skipped": bench.budget.skipped,
        "broken": {},
    }
    rate, done = top["flops_per_s"], results["steps"]
    print(f"{results['device']['name']}: {rate / 1e12:.0f} TFLOP/s in bf16", flush=True)
    parts: dict[str, Callable[[], sections.Rows]] = {
        "steps": lambda: sections.steps(bench, rate),
        "rivals": lambda: sections.rivals(bench, done, rate),
        "tokenizers": lambda: sections.tokenizers(bench, done),
        "attention": lambda: sections.attention(bench),
        "joint": lambda: sections.joint(bench),
        "frozen": lambda: sections.frozen(bench),
        "largest": lambda: sections.largest(bench),
    }
    for name, part in parts.items():
        collect(results, name, part, out)
    profile = sections.profile(bench)
    results["complete"] = True
    _write(results, out)
    if out:
        out.with_suffix(".profile.txt").write_text(profile, encoding="utf-8")
    return results


def collect(results: dict[str, Any], name: str, part: Callable[[], sections.Rows], out: Path | None) -> None:
    """Add a section's rows to the results one by one, each as soon as it is measured."""
    _write(results, out)
    try:
        for row in part():
            results[name].append(row)
            print(f"{name}:{_line(row)}", flush=True)
            _write(results, out)
    except Exception as error:  # noqa: BLE001 - what the other sections find is worth having
        results["broken"][name] = f"{type(error).__name__}: {error}"
        print(f"{name}: broken, {results['broken'][name]}", flush=True)


def _write(results: dict[str, Any], out: Path | None) -> None:
    """Put the results in place in one go, so that the file is whole at every moment."""
    results["goals"] = [vars(goal) for goal in goals(results)]
    if out is not None:
        draft = out.with_name(f".{out.name}.draft")
        draft.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        draft.replace(out)


def _device(workbench: Workbench) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": platform.processor() or platform.machine(), "memory": workbench.memory}
    if workbench.device.type == "cuda":
        found = torch.cuda.get_device_properties(workbench.device)
        facts |= {"name": found.name, "capability": f"{found.major}.{found.minor}", "driver": _driver()}
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return found.stdout.splitlines()[0].strip()


def _versions() -> dict[str, str]:
    names = ("torch", "deepspeed", "triton", "timm", "transformers")
    found = {name: metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), "cuda": str(torch.version.cuda), **found}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def goals(results: dict[str, Any]) -> list[Goal]:
    """What the project sets out to reach on an H200, and whether this run did."""
    found = []
    for size, wanted in (("h", 0.65), ("b", 0.55), ("l", 0.55)):
        for tokens in (539, 1176):
            value = _best_share(results["steps"], size, tokens)
            found.append(
                _goal(f"{size.upper()}, {tokens} tokens: share of the matrix rate", ">=", wanted, value)
            )
    for size, tokens in (("h", 539), ("h", 1176), ("b", 539)):
        ours = _best_share(results["steps"], size, tokens)
        theirs = max((r["share"] for r in _matching(results["rivals"], size, tokens)), default=None)
        ratio = ours / theirs if ours and theirs else None
        found.append(_goal(f"{size.upper()}, {tokens} tokens: times the best alternative", ">=", 1.3, ratio))
    own = [row["share_of_step"] for row in results["tokenizers"] if row["way"].startswith("strided")]
    found.append(_goal("tokenizer: share of the step", "<=", 0.03, max(own, default=None)))
    found.append(_goal("joint pass: times two passes, B", ">=", 1.15, _joint_gain(results["joint"])))
    parts = [row.get("time_of_full") for row in results["frozen"] if row["frozen_layers"]]
    values = [part for part in parts if part is not None]
    found.append(_goal("frozen prefix: part of the full step", "<=", 0.55, max(values, default=None)))
    return found


def _goal(name: str, relation: str, wanted: float, value: float | None) -> Goal:
    reached = None if value is None else value >= wanted if relation == ">=" else value <= wanted
    return Goal(name, f"{relation} {wanted}", value, reached)


def _matching(rows: list[dict[str, Any]], size: str, tokens: int) -> list[dict[str, Any]]:
    return [r for r in rows if r["size"] == size and r["tokens"] == tokens and "share" in r]


def _best_share(rows: list[dict[str, Any]], size: str, tokens: int) -> float | None:
    found = [r["share"] for r in _matching(rows, size, tokens) if r["kind"] == "step" and not r["joint"]]
    return max(found, default=None)


def _joint_gain(rows: list[dict[str, Any]]) -> float | None:
    times = {row["way"]: row["median_s"] for row in rows if row["size"] == "b" and "median_s" in row}
    if "one pass" not in times or "two passes" not in times:
        return None
    return times["two passes"] / times["one pass"]


def summary(results: dict[str, Any]) -> str:
    """A table for a terminal: every row with its spread, then the goals."""
    lines = [f"{results['device']['name']}: {results['ceiling']['flops_per_s'] / 1e12:.0f} TFLOP/s in bf16"]
    for section in SECTIONS:
        lines += ["", section, *(_line(row) for row in results[section])]
    lines += ["", "goals"]
    for goal in results["goals"]:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3f}"
        mark = {None: "?", True: "reached", False: "MISSED"}[goal["reached"]]
        lines.append(f"  {goal['name']}: {value}, wanted {goal['wanted']}: {mark}")
    lines += [f"  {name} is incomplete: {reason}" for name, reason in results["broken"].items()]
    if results["skipped"]:
        lines += ["", "no time left for: " + "; ".join(results["skipped"])]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    words = [str(row[key]) for key in ("name", "kind", "rival", "way", "kernel") if key in row]
    words += [
        f"{key}={row[key]}"
        for key in ("tokens", "head_width", "batch", "clips", "frozen_layers", "compile")
        if key in row
    ]
    if "failed" in row:
        return f"  {', '.join(words)}: {row['failed']}"
    if "median_s" in row:
        words.append(
            "{:.2f} ms [{:.2f}, {:.2f}]".format(*(1e3 * row[k] for k in ("median_s", "low_s", "high_s")))
        )
    numbers = ("share", "share_of_step", "ours_is_faster_by", "time_of_full", "operations_of_full")
    words += [f"{key}={row[key]:.3f}" for key in numbers if key in row]
    words += [
        f"{key}={row[key]}"
        for key in ("checkpointing", "offload", "predicted", "found")
        if key in row and "kind" not in row
    ]
    return "  " + ", ".join(words)


if __name__ == "__main__":
    main()
