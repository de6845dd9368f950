"""What `tubeworks launch plan` prints, for people."""

from __future__ import annotations

import time
from collections.abc import Sequence

from framework.wording import counted
from launch.plan import Plan

__all__ = ["show_plan"]


def show_plan(plan: Plan) -> str:
    """The plan, the script, and what would go wrong."""
    asked, pace = plan.submission, plan.pace
    where = f"{counted(asked.nodes, 'node')} x {counted(asked.ranks_per_node, 'rank')}"
    gpus = f", {counted(asked.gpus_per_node, 'GPU')} each" if asked.gpus_per_node else ", no GPUs"
    rows = [
        ("run folder", f"{asked.run}" + (f", goes on from step {plan.from_step}" if plan.from_step else "")),
        ("asks for", f"{where}{gpus}, {asked.minutes} min, partition {asked.partition or '(default)'}"),
        ("starts", _start(plan)),
        ("a step", _figure(pace.step, pace.step_origin)),
        ("a save", f"{_figure(pace.save, pace.save_origin)}; the ranks wait {pace.stall:.3g} s of it"),
        ("a start", _figure(pace.start, pace.start_origin)),
        ("one time limit", _reach(plan)),
        ("whole run", _whole(plan)),
        ("a checkpoint", f"{pace.bytes / 1e9:.3g} GB ({pace.bytes_origin}), {_room(plan)}"),
        ("warned to save", f"{asked.signal_seconds} s before the time limit"),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{asked.name}: nothing is submitted", *(f"  {label:<{width}}  {text}" for label, text in rows)]
    lines += ["", "sbatch gets:", *(f"  {line}".rstrip() for line in plan.script.splitlines())]
    lines += _listed("warning", plan.warnings)
    return "\n".join(lines)


def _listed(what: str, texts: Sequence[str]) -> list[str]:
    return ["", *(f"{what}: {text}" for text in texts)] if texts else []


def _start(plan: Plan) -> str:
    if plan.estimate is None:
        return "never: see the errors"
    if plan.estimate.start is None:
        return plan.estimate.text
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(plan.estimate.start))
    return f"about {when} on {plan.estimate.nodes}, says sbatch --test-only"


def _figure(value: float | None, origin: str) -> str:
    return origin if value is None else f"{value:.3g} s ({origin})"


def _reach(plan: Plan) -> str:
    if plan.reachable is None or plan.epochs is None:
        return "unknown"
    epochs = ", ".join(f"{count:.3g} epochs of {name}" for name, count in plan.epochs.items())
    return f"to step {plan.reachable} of {plan.steps}: {epochs}"


def _whole(plan: Plan) -> str:
    if plan.hours is None:
        return "unknown"
    unit = "GPU-hours" if plan.submission.gpus_per_node else "rank-hours"
    jobs = f", {counted(plan.jobs, 'time limit')}" if plan.jobs is not None else ""
    return f"{plan.hours:.3g} h, {plan.gpu_hours:.3g} {unit}{jobs}"


def _room(plan: Plan) -> str:
    free = "unknown" if plan.free_bytes is None else f"{plan.free_bytes / 1e9:.3g} GB"
    need = plan.pace.bytes * plan.kept_checkpoints / 1e9
    return f"{plan.kept_checkpoints} at once: {need:.3g} GB of {free} free"
