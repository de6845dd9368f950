"""Runs that are killed again and again, and go on until they end as if nothing had been.

The short version is a test (`test_kills`); the long one is `benchmarks/kill_test.py`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faulty_disk
import torch
from rank_processes import CPU, Job, command_line, journalled, train_to_end
from safetensors.torch import load_file

from framework.training.checkpoint import newest_valid
from framework.training.checkpoint_manifest import checkpoint_folders, verify

RANKS = 2
SETTINGS = (
    "train.steps=12",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "train.log_every=3",  # no checkpoint lies at every logging point: sums of an interval must survive
)

CODE_PHASES: dict[str, tuple[str, str, int]] = {
    "build": ("framework.training.loop", "start_engine", 1),
    "restore": ("framework.training.checkpoint.CheckpointReader", "read", 60),
    "step": ("framework.training.steps", "take_step", 11),
    "copy": ("framework.training.snapshot.HostCopies", "_buffer", 600),
    "gather": ("framework.training.saver.Saver", "_commit", 5),
}
"""Phase -> what is called in it, and how often at most before the kill."""

DISK_PHASES: dict[str, int] = {
    "write": 400,
    "sync": 12,
    "manifest": 4,
    "commit": 4,
    "committed": 4,
    "prune": 3,
    "remove": 3,
    "journal": 12,
}
"""Phase -> how many of its operations may pass before the kill."""

MAIN_ONLY = ("manifest", "commit", "committed", "prune", "remove", "journal")
"""What only rank 0 does."""

PHASES = (*CODE_PHASES, *DISK_PHASES, "any moment")


@dataclass(frozen=True)
class Kill:
    """Who is killed when: at the `count`-th time that a rank comes by a phase, or after some seconds."""

    phase: str
    rank: int
    count: int
    all_ranks: bool
    seconds: float = 0.0


@dataclass
class Outcome:
    """What became of one run."""

    kills: list[Kill] = field(default_factory=list)
    """Those that hit."""
    attempts: int = 0
    problems: list[str] = field(default_factory=list)


def draw_kill(phase: str, draws: random.Random) -> Kill:
    """A random kill in a phase."""
    rank = 0 if phase in MAIN_ONLY else draws.randrange(RANKS)
    most = {**{name: entry[2] for name, entry in CODE_PHASES.items()}, **DISK_PHASES}.get(phase, 1)
    # rather early: an attempt that goes on near the end comes by seldom
    count = min(draws.randint(1, most), draws.randint(1, most))
    return Kill(phase, rank, count, draws.random() < 0.5, draws.uniform(0.2, 4.0))


def doomed_rank(kill: Kill | None, *arguments: str) -> None:
    """`tubeworks train …` in a rank that may have its end built in."""
    if kill is not None and int(os.environ["RANK"]) == kill.rank:
        if kill.phase in DISK_PHASES:
            faulty_disk.use(faulty_disk.KillingDisk(kill.phase, kill.count))
        elif kill.phase in CODE_PHASES:
            _die_in(*CODE_PHASES[kill.phase][:2], kill.count)
    command_line(*arguments)


def _die_in(owner: str, name: str, count: int) -> None:
    """Kill this process at the `count`-th call of a function."""
    import importlib

    try:
        holder: Any = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, attribute = owner.rpartition(".")
        holder = getattr(importlib.import_module(module), attribute)
    real: Callable[..., Any] = getattr(holder, name)
    left = [count]

    def doomed(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            faulty_disk.die()
        return real(*arguments, **keywords)

    setattr(holder, name, doomed)


def attempt(recipe: Path, run: Path, logs: Path, kill: Kill | None, *settings: str) -> tuple[Job, bool]:
    """One attempt at a run; whether it was killed."""
    arguments = ["train", str(recipe), *SETTINGS, *settings, "--run", str(run)]
    job = Job(RANKS, logs, doomed_rank, kill, *arguments)
    killed = False
    if kill is not None and kill.phase == "any moment":
        time.sleep(kill.seconds)
        alive = job.processes[kill.rank].is_alive()
        job.send(signal.SIGKILL, None if kill.all_ranks else [kill.rank])
        killed = alive
    elif kill is not None:
        job.processes[kill.rank].join(180)
        killed = job.processes[kill.rank].exitcode == -signal.SIGKILL
        if killed and kill.all_ranks:
            job.kill()
    # who has lost its peer while they were still meeting would wait for long; a launcher ends it, too
    job.wait(15 if killed else 180)
    return job, killed


def uninterrupted(recipe: Path, run: Path, *settings: str) -> Path:
    """The run that nobody kills."""
    return train_to_end(recipe, run, RANKS, *SETTINGS, *settings)


def killed_run(recipe: Path, whole: Path, run: Path, kills: list[Kill], *settings: str) -> Outcome:
    """Kill a run at each of the given occasions, let it end, and compare it with the one that was not."""
    outcome = Outcome()
    for number, kill in enumerate([*kills, None, None]):
        job, killed = attempt(recipe, run, run.with_name(f"{run.name}-logs") / str(number), kill, *settings)
        outcome.attempts += 1
        codes = [process.exitcode for process in job.processes]
        if killed and kill is not None:
            outcome.kills.append(kill)
            continue
        if codes == [0] * RANKS:
            break
        outcome.problems.append(f"{kill}: exit codes {codes}: {[job.said(r)[-800:] for r in range(RANKS)]}")
        return outcome
    outcome.problems += differences(run, whole)
    return outcome


def differences(run: Path, whole: Path) -> list[str]:
    """What is not as in the uninterrupted run: the loss curve, and every bit of the last checkpoint."""
    found = []
    if journalled(run) != journalled(whole):
        found.append("the loss curve differs")
    ours, theirs = newest_valid(run), newest_valid(whole)
    if ours.name != theirs.name:
        return [*found, f"the last checkpoint is {ours.name} instead of {theirs.name}"]
    for path in sorted(theirs.glob("*.safetensors")):
        mine, other = load_file(ours / path.name), load_file(path)
        same = mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in other)
        if not same:
            found.append(f"{path.name} differs")
    folders = checkpoint_folders(run)
    found += [f"{folder.name}: {verify(folder)}" for folder in folders if verify(folder)]
    if [folder.name for folder in folders] != [folder.name for folder in checkpoint_folders(whole)]:
        found.append(f"other checkpoints are kept: {[folder.name for folder in folders]}")
    left = [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step-")]
    return [*found, *(f"left behind: {name}" for name in left)]


def counted(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """How often each phase was hit, and how often by a kill of all ranks at once."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    total, together = Counter(k.phase for k in kills), Counter(k.phase for k in kills if k.all_ranks)
    return {phase: {"kills": total[phase], "of all ranks": together[phase]} for phase in PHASES}


__all__ = ["CPU", "PHASES", "Kill", "Outcome", "counted", "draw_kill", "killed_run", "uninterrupted"]
