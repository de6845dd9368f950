"""`tubeworks train --ranks 2` as a user starts it: a killed rank is named, a signal saves, both go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rank_processes import CPU, journalled, steps_in_journal, train_to_end

from framework.training.checkpoint_manifest import checkpoint_folders, verify
from launch.local import accusations

LONG = ("train.steps=60", "checkpoint.every=10", "checkpoint.keep=1")


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe), *LONG, "--ranks", "2"]
    return subprocess.Popen(
        [*command, "--run", str(run)],
        env={**os.environ, **CPU},
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def rank_pid(launcher: int, rank: int) -> int:
    """The process of a rank, found by its environment among the launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (pid,) = [pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()]
    return int(pid)


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_rank_and_a_signal(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(recipe_file, run)
    wait_for(first, lambda: checkpoint_folders(run) != [])
    os.kill(rank_pid(first.pid, 1), signal.SIGKILL)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in said
    assert "error: lost contact to another rank" in said
    assert "Traceback" not in said

    before = (run / "journal.jsonl").stat().st_size
    second = start(recipe_file, run)
    wait_for(second, lambda: steps_in_journal(run, before) > 0)
    second.send_signal(signal.SIGTERM)
    _, said = second.communicate(timeout=60)
    others = (run / "logs" / "rank-1.log").read_text()
    assert second.returncode == 128 + signal.SIGTERM, f"{said[-2000:]}\nrank 1: {others[-2000:]}"
    assert "going on from step" in said
    assert "stopped after" in said
    (saved,) = checkpoint_folders(run)
    assert verify(saved) == []
    assert int(saved.name.removeprefix("step-")) == steps_in_journal(run)

    train_to_end(recipe_file, run, 2, *LONG)
    whole = train_to_end(recipe_file, tmp_path / "whole", 2, *LONG)
    assert journalled(run) == journalled(whole)


def test_what_several_ranks_are_accused_of_is_said_once() -> None:
    accused = {"0": "dead tubes", "1": "dead tubes", "2": "no room"}
    assert accusations(accused) == ["ranks 0, 1: dead tubes", "rank 2: no room"]


def test_a_rank_imports_nothing_that_only_costs_time(recipe_file: Path, tmp_path: Path) -> None:
    """DeepSpeed would bring MLflow and torch's compiler: 3 s of processor time for every rank at a start."""
    overrides = ["train.steps=3", "tracking.mlflow=false"]
    code = (
        "import sys; from pathlib import Path; from launch.local import train_command\n"
        f"code = train_command({str(recipe_file)!r}, {overrides!r}, 1, Path({str(tmp_path / 'run')!r}))\n"
        "unwanted = {'mlflow', 'torch._inductor.select_algorithm'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(unwanted) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **CPU}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_rank_0_has_said_is_not_said_again(recipe_file: Path, tmp_path: Path) -> None:
    """Files may have 100 kB here, and a checkpoint needs more: all ranks fail of it together."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += "sys.argv[0] = 'tubeworks'; runpy.run_module('launch.cli', run_name='__main__')"
    settings = ["train.steps=4", "checkpoint.every=2", "data.workers=0", "tracking.mlflow=false"]
    command = [sys.executable, "-c", limited, "train", str(recipe_file), *settings, "--ranks", "2"]
    done = subprocess.run(
        [*command, "--run", str(tmp_path / "run")],
        env={**os.environ, **CPU},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("the checkpoint of step 2 was not written") == 1, done.stderr
    assert "what every rank was at: " in done.stderr
