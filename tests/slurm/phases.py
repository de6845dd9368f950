"""Where the time goes between free nodes and the first step: what `pace/sitecustomize.py` has noted."""

from __future__ import annotations

from pathlib import Path

MILESTONES = {
    "batch script": "Slurm starts the batch script",
    "python": "the supervisor has decided, srun starts the ranks",
    "framework.training.loop imported": "torch and our code are imported",
    "meet": "the ranks have met",
    "start_process_group": "DeepSpeed is imported, the process group works",
    "open_data": "shards and plan are open",
    "choose_checkpoint": "the newest checkpoint is verified",
    "build_model": "the model is built",
    "start_engine": "DeepSpeed's engine is built",
    "prepare": "weights and moments are restored",
    "Recorder": "journal and MLflow's mirror have begun",
    "take_step": "the first step is done",
}
"""What is noted, in this order, and what it means."""


def phases_of(path: Path, job_id: str, restart: int, since: float) -> dict[str, float]:
    """Seconds after `since` at which the last rank of an attempt had passed each milestone."""
    passed: dict[str, float] = {}
    for line in path.read_text().splitlines():
        when, job, number, rank, name = line.split(" ", 4)
        mine = job == job_id and int(number) == restart and (rank != "-" or name == "batch script")
        if mine and name in MILESTONES:
            passed[name] = max(passed.get(name, 0.0), float(when))
    return {meaning: round(passed[name] - since, 1) for name, meaning in MILESTONES.items() if name in passed}
