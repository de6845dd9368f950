"""`tubeworks launch plan` against a real Slurm: figures of a run, and what is refused before a submission."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from runs import environment

from framework.errors import CheckpointError, SchedulerError
from launch import slurm
from launch.pace import checkpoint_bytes
from launch.plan import Plan, plan_run
from launch.plan_page import show_plan
from launch.wishes import Wishes


def plan(recipe: Path, run: Path, *overrides: str, hardware: str | None = None, **wishes: object) -> Plan:
    asked = {"nodes": 2, "ranks_per_node": 1, "partition": "low", "time": "10", **wishes}
    site = run.with_name(f"{run.name}-site.yaml")
    site.write_text("signal_seconds: 60\n")
    return plan_run(str(recipe), overrides, Wishes(**asked), site, run, hardware)  # type: ignore[arg-type]


def test_a_run_that_has_trained_is_measured(
    cluster: Cluster, recipe_file: Path, whole: dict[int, dict[str, float]], runs: Path, tmp_path: Path
) -> None:
    from framework.recipe import load_recipe

    found = plan(recipe_file, runs / "whole")
    assert found.problems == ()
    assert (found.from_step, found.steps) == (max(whole), max(whole))
    assert (found.pace.step_origin, found.pace.start_origin, found.pace.bytes_origin) == ("measured",) * 3
    assert found.pace.save_origin.startswith("measured")
    lines = [json.loads(line)["metrics"] for line in (runs / "whole" / "journal.jsonl").open()]
    steps = [line["perf/step_s"] for line in lines if "perf/step_s" in line]
    assert found.pace.step is not None
    assert min(steps) <= found.pace.step <= max(steps)
    assert found.pace.save == max(line.get("checkpoint/save_s", 0.0) for line in lines)
    # what is estimated for a run that never saved is what a save really takes, headers aside
    estimate = checkpoint_bytes(load_recipe(str(recipe_file)).recipe)
    assert estimate == pytest.approx(found.pace.bytes, rel=0.25)
    assert estimate < found.pace.bytes


def test_what_a_run_that_never_ran_would_do(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "fresh"
    found = plan(recipe_file, run, "train.steps=100000000", hardware="h100", time="60")
    assert found.problems == ()
    assert found.estimate is not None
    assert found.estimate.start is not None
    assert abs(found.estimate.start - time.time()) < 120
    assert slurm.expand_nodes(found.estimate.nodes) == ["c1", "c2"]
    assert "#SBATCH --signal=USR2@60" in found.script.splitlines()
    assert found.pace.step is not None
    assert found.reachable is not None
    usable = 3600 - 60 - found.pace.start
    one = found.pace.step + found.pace.stall / 10
    assert found.reachable == int(usable / one)
    assert found.epochs == {name: pytest.approx(found.reachable * 8 / 24) for name in ("motion", "digits")}
    assert found.gpu_hours == pytest.approx(1e8 * one * 2 / 3600)
    assert found.jobs == -(-100_000_000 // found.reachable)
    assert f"to step {found.reachable} of 100000000" in show_plan(found)
    assert any("max_requeues" in text for text in found.warnings)
    # nothing was submitted, nothing is left
    assert slurm.jobs_of_user() == []
    assert not run.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh-site.yaml"]


def test_refused_before_submission(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    """Partition, time limit and folder at once; each says what to do."""
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "launch.cli", "launch", "plan", str(recipe_file), "--json"]
    options = ["--partition", "hihg", "--time", "2", "--run", str(tmp_path / "file" / "run")]
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, **environment(pace=0.0)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == CheckpointError.exit_code
    said = json.loads(done.stdout)["problems"]
    assert len(said) == 3
    assert "cannot be written" in said[0]
    assert f"{tmp_path}/file" in said[0]
    assert "no partition `hihg`: did you mean `high`? There are low, high" in said[1]
    assert "too short for one checkpoint" in said[2]
    assert "At least 5 min" in said[2]
    assert all(f"error: {text}" in done.stderr for text in said)
    assert slurm.jobs_of_user() == []


def test_limits_of_the_cluster(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    long = plan(recipe_file, tmp_path / "long", time="61")
    assert "longer than partition low allows (60 min)" in long.problems[0]
    assert long.exit_code == SchedulerError.exit_code
    many = plan(recipe_file, tmp_path / "many", nodes=4)
    assert many.estimate is None
    assert "sbatch --test-only" in many.problems[0]
    nowhere = plan_run(str(recipe_file), (), Wishes(partition="low"), None, Path("/proc/nowhere"))
    assert "cannot be written" in nowhere.problems[0]
