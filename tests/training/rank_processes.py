"""Ranks of a training, forked from a server that has imported torch and DeepSpeed."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from framework.training.checkpoint_manifest import checkpoint_folders, step_of
from framework.world import World
from launch.local import free_port, rank_environment

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    # deepspeed.initialize imports Muon, which imports torch's compiler, and that takes longest of all
    ["framework.training.loop", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "launch.local"]
)

CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""What these tests prove holds bit by bit on the CPU."""


def rank_main(
    environment: dict[str, str], log: str, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    """What a rank does: take its place in the world, write to its log, and work."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    try:
        sys.exit(work(*arguments))
    finally:
        # multiprocessing leaves them out in its children; a rank that a shell starts runs them
        atexit._run_exitfuncs()


def command_line(*arguments: str) -> None:
    """`tubeworks ARGUMENTS` in this process; leaves it with the exit code."""
    from launch.cli import app

    app(list(arguments), prog_name="tubeworks")


class Job:
    """All ranks of a training."""

    def __init__(self, ranks: int, logs: Path, work: Callable[..., Any], *arguments: Any) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"test-rank-{rank}.log" for rank in range(ranks)]
        self.journal_before = 0  # bytes that earlier attempts have left in the run's journal
        port = free_port()
        self.processes: list[ForkServerProcess] = []
        for rank in range(ranks):
            environment = rank_environment(World(rank, ranks, rank, ranks), port, CPU)
            process = context.Process(
                target=rank_main, args=(environment, str(self.logs[rank]), work, arguments)
            )
            with patch.dict(os.environ, CPU):  # for the server, which the first process starts
                process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """The exit codes; who still runs when the time is over is killed and has None."""
        deadline = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
        self.kill()
        return codes

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, by default to all."""
        for rank, process in enumerate(self.processes):
            if process.pid is not None and process.is_alive() and (ranks is None or rank in ranks):
                os.kill(process.pid, number)

    def kill(self) -> None:
        """SIGKILL for all."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def said(self, rank: int = 0) -> str:
        """What a rank has written."""
        return self.logs[rank].read_text(errors="replace")


def start_training(recipe: Path, run: Path, ranks: int, *overrides: str) -> Job:
    """`tubeworks train` as so many ranks, as under torchrun."""
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=recipe.parent))
    journal = run / "journal.jsonl"
    before = journal.stat().st_size if journal.exists() else 0
    job = Job(ranks, logs, command_line, "train", str(recipe), *overrides, "--run", str(run))
    job.journal_before = before
    return job


def train_to_end(recipe: Path, run: Path, ranks: int, *overrides: str) -> Path:
    """Train until the regular end."""
    job = start_training(recipe, run, ranks, *overrides)
    codes = job.wait()
    assert codes == [0] * ranks, (codes, [job.said(rank)[-3000:] for rank in range(ranks)])
    return run


def steps_in_journal(run: Path, after: int = 0) -> int:
    """The last step that has its metrics in the journal, in what follows its first `after` bytes."""
    path = run / "journal.jsonl"
    last = 0
    for line in path.read_bytes()[after:].splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # being written
            continue
        if "train/loss" in entry["metrics"]:
            last = entry["step"]
    return last


def wait_for_step(job: Job, run: Path, step: int, seconds: float = 120) -> None:
    """Wait until this job, and not one before it, has a step in the journal."""
    wait_until(job, lambda: steps_in_journal(run, job.journal_before) >= step, f"step {step}", seconds)


def wait_for_checkpoint(job: Job, run: Path, step: int, seconds: float = 120) -> None:
    """Wait until a checkpoint of this step or a later one is committed, which happens in the background."""
    wait_until(
        job,
        lambda: any(step_of(folder) >= step for folder in checkpoint_folders(run)),
        f"a checkpoint of step {step}",
        seconds,
    )


def wait_until(job: Job, reached: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait for something that a running training is to reach."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"{what} was not reached:\n{job.said()[-3000:]}"
        assert all(process.is_alive() for process in job.processes), job.said()[-3000:]
        time.sleep(0.002)


def journalled(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of every step as the last attempt wrote them, times and rates left out."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        kept = {key: value for key, value in entry["metrics"].items() if key.startswith("train/")}
        if kept:
            steps[entry["step"]] = kept
    return steps
