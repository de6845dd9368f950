"""What a run is known to cost: seconds of a step, of a save, of a start, and bytes of a checkpoint.

Measured where the run folder has been trained in; what was never measured is estimated, and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import TubeworksError
from framework.tracking.journal import Entry, journal_path, parse_line
from framework.training.checkpoint_manifest import checkpoint_folders, read_manifest
from framework.wording import counted
from launch.submission import Submission, attempts_of

if TYPE_CHECKING:
    from framework.recipe.schema import Recipe

__all__ = ["Pace", "checkpoint_bytes", "pace_of"]

START_SECONDS = 120.0
"""Assumed from the batch script to the first step: imports, shards, NCCL, a checkpoint that is read."""
WRITE_RATE = 2e8
"""Bytes a second that a rank is assumed to write to a shared file system."""
LAST_STEPS = 200


@dataclass(frozen=True)
class Pace:
    """Seconds and bytes, each with where it comes from: measured, forecast, estimated or assumed."""

    step: float | None
    step_origin: str
    save: float
    save_origin: str
    stall: float
    """Of which the training waits."""
    start: float
    start_origin: str
    bytes: int
    bytes_origin: str


def pace_of(run: Path, recipe: Recipe, submission: Submission, hardware: str | None) -> Pace:
    """What is known of a run; `hardware` (a GPU's name or a results file) is for one that never ran.

    A step that was measured on another number of ranks is taken in proportion to it.

    Errors:
        RecipeError: no such hardware, or a model that cannot be built.
    """
    entries = _entries(run)
    step, origin = _measured_step(run, entries, submission)
    if step is None and hardware is not None:
        step, origin = _forecast_step(recipe, submission, hardware)
    size, size_origin = _bytes(run, recipe)
    saves = [one for entry in entries if (one := entry.metrics.get("checkpoint/save_s")) is not None]
    stalls = [one for entry in entries if (one := entry.metrics.get("checkpoint/stall_s")) is not None]
    # ranks of one node write through one network card
    estimate = size / submission.nodes / WRITE_RATE
    start = _measured_start(run, entries)
    return Pace(
        step,
        origin,
        max(saves) if saves else estimate,
        f"measured, the longest of {len(saves)}" if saves else "estimated at 0.2 GB/s from each node",
        statistics.median(stalls) if stalls else estimate,
        START_SECONDS if start is None else start,
        "assumed" if start is None else "measured",
        size,
        size_origin,
    )


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of one checkpoint: weights as they train, frozen ones, moments, and the moving average."""
    from framework.forecast.footprint import fake_model

    model = fake_model(recipe)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    fixed = sum(one.numel() * one.element_size() for one in model.parameters() if not one.requires_grad)
    fixed += sum(one.numel() * one.element_size() for one in model.buffers())
    optimizer = recipe.optimizer
    moments = (1 if optimizer.momentum else 0) if optimizer.name == "sgd" else 2
    return trained * 4 * (1 + moments + (recipe.train.ema_decay is not None)) + fixed


def _bytes(run: Path, recipe: Recipe) -> tuple[int, str]:
    for folder in reversed(checkpoint_folders(run)):
        try:
            return sum(one["bytes"] for one in read_manifest(folder)["files"]), "measured"
        except (TubeworksError, OSError, KeyError):
            continue
    return checkpoint_bytes(recipe), "estimated"


def _entries(run: Path) -> list[Entry]:
    path = journal_path(run)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [entry for line in lines if (entry := parse_line(line)) is not None]


def _measured_step(run: Path, entries: Sequence[Entry], submission: Submission) -> tuple[float | None, str]:
    last = entries[-1].attempt if entries else 0
    times = [
        (entry.attempt, value) for entry in entries if (value := entry.metrics.get("perf/step_s")) is not None
    ]
    chosen = [value for number, value in times if number == last] or [value for _, value in times]
    if not chosen:
        return None, "unknown: say --hardware, or train some steps first"
    seconds = statistics.median(chosen[-LAST_STEPS:])
    before = _ranks_of(run)
    if before is None or before == submission.ranks:
        return seconds, "measured"
    return seconds * before / submission.ranks, f"measured on {counted(before, 'rank')}, in proportion"


def _ranks_of(run: Path) -> int | None:
    from framework.training.run_folder import read_run

    state = read_run(run)
    return int(state["attempts"][-1]["ranks"]) if state and state["attempts"] else None


def _forecast_step(recipe: Recipe, submission: Submission, hardware: str) -> tuple[float, str]:
    from framework.forecast.forecast import Surroundings, forecast
    from framework.forecast.hardware import find_hardware

    around = Surroundings(submission.nodes, submission.ranks_per_node)
    found = forecast(recipe, find_hardware(hardware), around)
    return found["step_s"], f"forecast for {found['hardware']['name']}"


def _measured_start(run: Path, entries: Sequence[Entry]) -> float | None:
    """Median seconds from the begin of an attempt to its first logged step."""
    firsts: dict[int, Entry] = {}
    for entry in entries:
        if "perf/step_s" in entry.metrics:
            firsts.setdefault(entry.attempt, entry)
    begins = [attempt.began for attempt in attempts_of(run)]
    waits = [
        entry.time - max(begin for begin in begins if begin <= entry.time)
        for entry in firsts.values()
        if any(begin <= entry.time for begin in begins)
    ]
    return statistics.median(waits) if waits else None
