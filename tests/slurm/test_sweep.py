"""An array of four runs, each with a folder of its own, nested in MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from cluster import Cluster
from runs import SlurmRun, environment, journal, mlflow_losses, mlflow_status

from framework.errors import RecipeError, TubeworksError
from launch import slurm
from launch.following import cancel_run
from launch.submission import attempts_of
from launch.sweep import elements_of, submit_sweep
from launch.wishes import Wishes


def test_combinations() -> None:
    found = elements_of(["optimizer.lr=1e-4,3e-4", "optimizer.betas=[0.9,0.95],[0.9,0.999]"])
    assert [one.overrides for one in found] == [
        ("optimizer.lr=1e-4", "optimizer.betas=[0.9,0.95]"),
        ("optimizer.lr=1e-4", "optimizer.betas=[0.9,0.999]"),
        ("optimizer.lr=3e-4", "optimizer.betas=[0.9,0.95]"),
        ("optimizer.lr=3e-4", "optimizer.betas=[0.9,0.999]"),
    ]
    assert found[1].name == "1-lr=1e-4_betas=_0.9_0.999"
    assert len({one.name for one in found}) == 4
    for wrong in ("optimizer.lr", "optimizer.lr=", "=1", "optimizer.lr=1,,2", "optimizer.lr=1,1"):
        with pytest.raises(RecipeError, match="--array"):
            elements_of([wrong])


def test_an_array_of_four(
    cluster: Cluster, recipe_file: Path, tmp_path: Path, whole: dict[int, dict[str, float]]
) -> None:
    site, folder = tmp_path / "site.yaml", tmp_path / "sweep"
    site.write_text("preflight: {enabled: false}\n")
    wishes = Wishes(nodes=1, ranks_per_node=2, partition="low", time="10")
    array = ["optimizer.lr=1e-3,2e-3", "seed=3,4"]
    with patch.dict(os.environ, environment(0.0)):
        # so few steps teach nothing, which would end a training otherwise
        submissions = submit_sweep(str(recipe_file), ("guards.collapse=0",), array, wishes, site, folder)
    ids = [str(one.job_id) for one in submissions]
    assert ids == [f"{ids[0].partition('_')[0]}_{number}" for number in range(4)]
    runs = [SlurmRun(cluster, Path(one.run)) for one in submissions]
    # one goes back into the queue, as after a preemption, and no other
    runs[2].wait_for_state("RUNNING")
    slurm.requeue(ids[2])
    for run in runs:
        run.wait_for_state("COMPLETED")

    # the first is the run of the other tests, and no other is
    losses = [journal(run.folder) for run in runs]
    assert losses[0] == whole
    assert all(len(steps) == len(whole) for steps in losses)
    assert len({json.dumps(steps) for steps in losses}) == 4
    for run in runs:
        assert run.causes[-1] == "finished"
        assert mlflow_status(run.folder) == "FINISHED"
        assert len(mlflow_losses(run.folder)) == len(whole)
        assert (run.folder / "logs" / f"slurm-{run.job_id}.log").stat().st_size > 0
        assert attempts_of(run.folder)[-1].job_id == run.job_id
    assert [run.job.restarts for run in runs] == [0, 0, 1, 0]
    # each step has met in a file of its own: no port was shared
    meetings = [path.name for run in runs for path in (run.folder / "launch" / "rendezvous").glob("*.json")]
    assert len(set(meetings)) == len(meetings) >= 4

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    parent = json.loads((folder / "sweep.json").read_text())["mlflow_run"]
    children = [client.get_run(str(one.mlflow_run)) for one in submissions]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent}
    assert client.get_run(parent).info.status == "FINISHED"
    assert [child.data.params["optimizer.lr"] for child in children] == ["0.001", "0.001", "0.002", "0.002"]

    with pytest.raises(TubeworksError, match="holds a sweep already"):
        submit_sweep(str(recipe_file), (), array, wishes, site, folder)


def test_one_element_is_cancelled_alone(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("preflight: {enabled: false}\nsbatch: {begin: now+1hour}\n")
    wishes = Wishes(nodes=1, ranks_per_node=1, partition="low", time="10")
    array, overrides = ["seed=1,2,3"], ["tracking.mlflow=false"]
    with patch.dict(os.environ, environment(0.0)):
        submissions = submit_sweep(str(recipe_file), overrides, array, wishes, site, tmp_path / "sweep")
    assert cancel_run(Path(submissions[1].run)) == f"job {submissions[1].job_id} is cancelled"
    left = cluster.run("squeue", "--noheader", "--array", "--format=%i %T").split("\n")
    assert sorted(filter(None, left)) == [f"{submissions[number].job_id} PENDING" for number in (0, 2)]
    assert [one.cause for one in attempts_of(Path(submissions[1].run))] == ["cancelled"]
    assert attempts_of(Path(submissions[0].run)) == []
