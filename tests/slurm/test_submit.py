"""Submitting: what is fixed in the run folder, what Slurm is asked for, and what is refused beforehand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from cluster import Cluster
from runs import environment, start

from framework.errors import DataError, RecipeError, SchedulerError, TubeworksError
from launch import slurm
from launch.following import cancel_run
from launch.submission import newest_step, read_submission
from launch.submit import batch_script, prepare_run, resubmit
from launch.wishes import Wishes

SITE = """\
partition: low
account: vision
signal_seconds: 77
environment: {NCCL_DEBUG: WARN}
setup: ["module() { true; }", "module load cuda"]
sbatch: {nice: "5"}
"""


def test_what_the_script_says(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(SITE)
    run = tmp_path / "a run"
    wishes = Wishes(nodes=2, gpus_per_node=2, time="1-0", exclude="c3", qos="long", container="image.sqsh")
    submission = prepare_run(str(recipe_file), ["train.steps=3"], wishes, tmp_path / "site.yaml", run)
    lines = batch_script(submission).splitlines()
    for wanted in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--time=1440",
        "--partition=low",
        "--account=vision",
        "--qos=long",
        "--exclude=c3",
        "--signal=USR2@77",
        "--nice=5",
        "--requeue",
        f"--chdir='{run}/code'",
    ):
        assert f"#SBATCH {wanted}" in lines
    assert "module load cuda" in lines
    assert not any("wckey" in line for line in lines)
    assert submission.container is not None
    assert submission.container["image"] == "image.sqsh"
    assert (run / "code" / "framework" / "training" / "loop.py").is_file()
    assert "steps: 3" in (run / "launch" / "recipe.yaml").read_text()
    assert json.loads((run / "code" / "git.json").read_text())["version"]
    assert read_submission(run) == submission


def test_no_secret_is_written_down(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    """The password of the tracking server comes from the environment, and is nowhere in the run folder."""
    secret = "s3cr3t-w0rd"
    with patch.dict(os.environ, {"MLFLOW_TRACKING_PASSWORD": secret, "MLFLOW_TRACKING_USERNAME": "me"}):
        run = start(
            cluster, recipe_file, tmp_path / "run", "tracking.mlflow=false", "train.steps=400", pace=1
        )
        run.wait_for_state("RUNNING")
        said = cluster.run("scontrol", "show", "job", run.job_id)
        run.wait(lambda: len(run.processes("c1", "c2")) == 2, "the ranks do not start")
        arguments = [
            Path(f"/proc/{pid}/cmdline").read_bytes()
            for node in ("c1", "c2")
            for pid in cluster.processes_of(node)
        ]
        assert cancel_run(run.folder) == f"job {run.job_id} is cancelled"
    assert run.causes == ["cancelled"]
    assert secret not in said
    assert not any(secret.encode() in one for one in arguments)
    holders = [
        path for path in run.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert holders == []


def test_what_is_refused_before_slurm_hears_of_it(
    cluster: Cluster, recipe_file: Path, tmp_path: Path
) -> None:
    def prepare(*overrides: str, run: str = "run", **wishes: object) -> None:
        with patch.dict(os.environ, environment(0)):
            prepare_run(str(recipe_file), overrides, Wishes(**wishes), None, tmp_path / run)  # type: ignore[arg-type]

    with pytest.raises(RecipeError, match="not divisible by 3"):
        prepare(nodes=3)
    with pytest.raises(RecipeError, match="--time: `tomorrow` is no time limit"):
        prepare(time="tomorrow")
    with pytest.raises(DataError, match="no-such"):
        prepare(f"data.sources.motion.path={tmp_path}/no-such")
    with pytest.raises(RecipeError, match="stepz"):
        prepare("train.stepz=3")
    for name in ("50%", "a:b", 'it"s', "it's", "back\\slash", "two\nlines"):
        with pytest.raises(RecipeError, match="Choose another --run folder"):
            prepare(run=name)
    with pytest.raises(RecipeError, match="',' separates the mounts of a container"):
        prepare(run="a,b", container="image.sqsh")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(TubeworksError, match="cannot write"):
        prepare(run="file/run")


def test_slurm_refuses(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match="invalid partition specified: nope"):
        start(cluster, recipe_file, tmp_path / "run", "tracking.mlflow=false", partition="nope")
    assert read_submission(tmp_path / "run").job_id is None
    assert slurm.jobs_of_user() == []


def test_one_job_per_run(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    """A run has one job at a time; one that waits gives way to a new submission."""
    blocker = cluster.run(
        "sbatch", "--parsable", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 300"
    )
    folder = tmp_path / "a run, again"  # what Slurm can be given, quoted
    run = start(cluster, recipe_file, folder, "tracking.mlflow=false", "train.steps=4", pace=0)
    assert run.wait_for_state("PENDING").reason in ("Resources", "Priority", "")
    with pytest.raises(TubeworksError, match=f"job {run.job_id} \\(pending\\) works on"):
        start(cluster, recipe_file, folder, "tracking.mlflow=false")
    first = run.job_id
    with patch.dict(os.environ, environment(0)):
        resubmit(run.folder, Wishes(nodes=1, time="5"))
    assert run.job_id != first
    assert slurm.show_job(first).state == "CANCELLED"
    assert (run.job.node_count, read_submission(run.folder).minutes) == (1, 5)
    cluster.run("scancel", blocker.strip())
    assert run.wait_for_state("COMPLETED", "FAILED").state == "COMPLETED", run.told()
    assert newest_step(run.folder) == 4
    with pytest.raises(TubeworksError, match="is finished"):
        resubmit(run.folder, Wishes())
    with pytest.raises(TubeworksError, match="was not submitted"):
        resubmit(tmp_path, Wishes())
