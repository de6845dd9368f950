"""Ctrl-C: a line at once, out soon with 130, and nothing left that tells of a crash that was none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_processes import CPU, Job, command_line, steps_in_journal, wait_for_checkpoint, wait_until

from framework.recipe import load_recipe
from framework.training import steps
from framework.training.checkpoint_manifest import checkpoint_folders
from framework.training.main import train_rank
from framework.training.supervision import Supervision
from framework.world import World

EARLY = "SIGINT: leaving before the first step, nothing was trained\n"


def start(recipe: Path, folder: Path, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    """A training in `folder`/runs/run, which is not there yet, with a terminal's process group of its own."""
    command = [sys.executable, "-m", "launch.start", "train", str(recipe), *overrides]
    command += ["--ranks", str(ranks)]
    return subprocess.Popen(
        [*command, "--run", str(folder / "runs" / "run")],
        env={**os.environ, **CPU},
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def holds_signals(pid: int) -> bool:
    """Whether a process has blocked SIGINT."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))
    return bool(mask & 1 << (signal.SIGINT - 1))


def press_ctrl_c(process: subprocess.Popen[str]) -> str:
    """As a terminal does it, to the whole group; what was said, when all have left."""
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    return said


def test_one_rank_while_torch_is_imported(recipe_file: Path, tmp_path: Path) -> None:
    process = start(recipe_file, tmp_path, 1)
    wait_for(process, lambda: holds_signals(process.pid))
    assert press_ctrl_c(process) == EARLY
    assert list(tmp_path.iterdir()) == []


def test_one_rank_that_holds_its_folder(recipe_file: Path, tmp_path: Path) -> None:
    process = start(recipe_file, tmp_path, 1)
    wait_for(process, (tmp_path / "runs" / "run" / ".training.lock").exists)
    assert press_ctrl_c(process) == EARLY
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["logs", "logs/rank-1.log", ".training.lock"])
def test_two_ranks_at_any_time_before_the_first_step(recipe_file: Path, tmp_path: Path, there: str) -> None:
    process = start(recipe_file, tmp_path, 2)
    wait_for(process, (tmp_path / "runs" / "run" / there).exists)
    said = press_ctrl_c(process).splitlines(keepends=True)
    assert sorted(said) == [EARLY, "SIGINT: passed on to 2 ranks\n"]  # whoever is first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_nobody_reads_any_more_saves(recipe_file: Path, tmp_path: Path, ranks: int) -> None:
    """As `tubeworks train ... 2>&1 | tee log`: the Ctrl-C also ends `tee`."""
    run = tmp_path / "runs" / "run"
    process = start(recipe_file, tmp_path, ranks, "train.steps=4000", "checkpoint.every=4000")
    assert process.stderr is not None
    wait_for(process, lambda: steps_in_journal(run) >= 1)
    process.stderr.close()
    unread = steps_in_journal(run) + 3
    deadline = time.monotonic() + 60
    while steps_in_journal(run) < unread:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    (attempt,) = json.loads((run / "run.json").read_text())["attempts"]
    assert attempt["cause"] == "stopped by SIGINT"
    assert [folder.name for folder in checkpoint_folders(run)] == [f"step-{attempt['end_step']:08d}"]


def stick_in_fifth_step(marker: str) -> None:
    take_step = steps.take_step

    def step_or_wait(session, step, *rest):  # type: ignore[no-untyped-def]
        if step == 4:
            Path(marker).touch()
            threading.Event().wait()
        return take_step(session, step, *rest)

    steps.take_step = step_or_wait


def train_until_stuck(marker: str, *arguments: str) -> None:
    """`tubeworks train` whose fifth step never ends."""
    stick_in_fifth_step(marker)
    command_line("train", *arguments)


def train_until_stuck_in_a_job(marker: str, recipe: str, run: str) -> int:
    """The same in a Slurm job whose controller does not answer."""
    stick_in_fifth_step(marker)
    silent = Supervision(lambda _number: threading.Event().wait())
    return train_rank(load_recipe(recipe).recipe, Path(run), World(), silent)


def insist(job: Job) -> None:
    """Ctrl-C, and again until it has left."""
    job.send(signal.SIGINT)
    wait_until(job, lambda: "Ctrl-C again: at once" in job.said(), "the answer to Ctrl-C", 60)
    deadline = time.monotonic() + 60
    while job.processes[0].is_alive() and time.monotonic() < deadline:
        job.send(signal.SIGINT)
        job.processes[0].join(0.1)
    assert job.wait(1) == [130]
    assert "SIGINT again: leaving without saving" in job.said()


def test_whoever_insists_does_not_wait_for_slurm(recipe_file: Path, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "stuck"
    job = Job(1, tmp_path, train_until_stuck_in_a_job, str(marker), str(recipe_file), str(run))
    wait_until(job, marker.exists, "the step that never ends", 120)
    insist(job)
    assert not (run / "postmortem").exists()


def test_whoever_insists_leaves_no_post_mortem(recipe_file: Path, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "stuck"
    job = Job(1, tmp_path, train_until_stuck, str(marker), str(recipe_file), "--run", str(run))
    wait_until(job, marker.exists, "the step that never ends", 120)
    assert steps_in_journal(run) == 4
    wait_for_checkpoint(job, run, 3)  # which is still being written: who insists does not wait for it
    insist(job)
    assert not (run / "postmortem").exists()
    (attempt,) = json.loads((run / "run.json").read_text())["attempts"]
    assert (attempt["cause"], attempt["end_step"]) == ("stopped by SIGINT", 4)
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-00000003"]
