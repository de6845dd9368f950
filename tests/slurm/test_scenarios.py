"""What happens to runs on a real Slurm, and that their losses are those of a run that nothing happened to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from phases import MILESTONES, phases_of
from runs import (
    STEPS,
    SlurmRun,
    environment,
    journal,
    mlflow_losses,
    mlflow_status,
    seconds_since,
    start,
)

from framework.data.sources import build_plan, open_sources
from framework.recipe import load_recipe
from launch import slurm
from launch.submission import attempts_of

Steps = dict[int, dict[str, float]]
Results = list[dict[str, object]]


def cli(*arguments: str, pace: float = 0.1) -> str:
    """What a `tubeworks` command prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env={**os.environ, **environment(pace)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def take_the_nodes(cluster: Cluster, seconds: float) -> str:
    """A job of the higher partition on all nodes; its id."""
    wrap = f"--wrap=sleep {seconds}"
    options = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null")
    return cluster.run("sbatch", "--parsable", *options, wrap).strip()


def attempt_began(run: SlurmRun, number: int) -> float:
    run.wait(lambda: len(run.causes) > number, f"attempt {number} did not begin")
    return attempts_of(run.folder)[number].began


def test_two_nodes_with_two_ranks_each(
    cluster: Cluster, recipe_file: Path, runs: Path, results: Results, whole: Steps
) -> None:
    folder, began = runs / "two-by-two", time.time()
    options = ("--nodes", "2", "--ranks-per-node", "2", "--partition", "low", "--time", "10")
    said = cli("launch", "submit", str(recipe_file), *options, "--run", str(folder), "--json")
    run = SlurmRun(cluster, folder)
    assert json.loads(said)["job_id"] == run.status.job_id
    assert mlflow_status(folder) in ("SCHEDULED", "RUNNING")

    run.wait_for_step(2)
    until_running = seconds_since(began)
    shown = json.loads(cli("launch", "status", str(folder), "--json"))
    assert (shown["state"], shown["steps"], shown["step"] >= 2) == ("RUNNING", STEPS, True)
    assert slurm.expand_nodes(shown["nodes"]) == ["c1", "c2"]
    run.wait(lambda: mlflow_status(folder) == "RUNNING", "MLflow does not know that it runs")
    assert str(folder) in cli("launch", "list", str(runs))

    assert run.wait_for_state("COMPLETED", "FAILED").state == "COMPLETED", run.told()
    assert run.causes == ["finished"]
    assert mlflow_status(folder) == "FINISHED"
    losses = {step: metrics["train/loss"] for step, metrics in journal(folder).items()}
    assert mlflow_losses(folder) == losses
    expected = {
        step: metrics["train/loss"] for step, metrics in whole.items()
    }  # of two ranks: rounded differently
    assert losses == pytest.approx(expected, rel=1e-4)
    said = cli("launch", "logs", str(folder))
    assert f"step {STEPS}/{STEPS}" in said
    assert "finished after" in said
    assert (folder / "logs" / "rank-3.log").is_file()
    said = cli("launch", "status", str(folder))
    assert f"step {STEPS} of {STEPS}" in said
    assert "FINISHED" in said
    results.append({"scenario": "two nodes x two ranks to the end", "first steps after s": until_running})


@pytest.mark.parametrize(("user_signal", "ranks"), [(True, 4), (False, 2)])
def test_preempted(
    cluster: Cluster,
    recipe_file: Path,
    runs: Path,
    results: Results,
    whole: Steps,
    monkeypatch: pytest.MonkeyPatch,
    user_signal: bool,
    ranks: int,
) -> None:
    if not user_signal:
        cluster.restart_controller(user_signal=False)
    monkeypatch.setenv("TEST_PHASES", str(runs / f"phases-{user_signal}.txt"))
    try:
        run = start(cluster, recipe_file, runs / f"preempted-{user_signal}", ranks_per_node=ranks // 2)
        run.wait_for_step(8)
        taken = time.time()
        other = take_the_nodes(cluster, 5)
        run.wait(lambda: slurm.show_job(other).state == "RUNNING", "the nodes are not given up")
        given_up = seconds_since(taken)
        assert mlflow_status(run.folder) in ("RUNNING", "SCHEDULED"), run.told()
        run.wait(lambda: slurm.show_job(other).state == "COMPLETED", "the other job does not end")
        free = slurm.show_job(other).ends
        again = run.first_step_at(1)
        assert run.wait_for_state("COMPLETED", "FAILED").state == "COMPLETED", run.told()
    finally:
        if not user_signal:
            cluster.restart_controller(user_signal=True)
    assert run.causes == ["preempted", "finished"]
    stopped_at = attempts_of(run.folder)[0].to_step
    assert stopped_at == attempts_of(run.folder)[1].from_step
    assert stopped_at is not None
    assert stopped_at >= 8
    assert run.job.restarts == 1
    equal = journal(run.folder) == whole
    assert equal or ranks != 2  # of other numbers of ranks the sums are rounded differently
    assert loss_of(journal(run.folder)) == pytest.approx(loss_of(whole), rel=1e-4)
    assert mlflow_status(run.folder) == "FINISHED"
    assert free is not None
    phases = phases_of(Path(os.environ["TEST_PHASES"]), run.job_id, 1, free)
    assert list(phases) == list(MILESTONES.values())
    results.append(
        {
            "scenario": f"preempted, {'with' if user_signal else 'without'} preempt_send_user_signal",
            "ranks": ranks,
            "nodes given up after s": given_up,
            "first step after the nodes were free, s": round(again - free, 1),
            "all ranks had passed, s after the nodes were free": phases,
            "load at the end": round(os.getloadavg()[0], 1),
            "saved at step": stopped_at,
            "losses equal the uninterrupted run": "bit for bit" if equal else "to rounding",
        }
    )


def loss_of(steps: Steps) -> dict[int, float]:
    return {step: metrics["train/loss"] for step, metrics in steps.items()}


def end_soon(run: SlurmRun) -> None:
    """Bring the time limit near, whole minutes as they are: one to two minutes of the job are left."""
    started = run.job.started
    assert started is not None
    minutes = int((time.time() - started + 45) / 60) + 1
    run.cluster.run("scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={minutes}")


def test_the_time_limit(
    cluster: Cluster, recipe_file: Path, runs: Path, results: Results, whole: Steps
) -> None:
    site = "signal_seconds: 40\nmax_requeues: 1\n"
    run = start(cluster, recipe_file, runs / "limit", pace=2.0, site=site)
    run.wait_for_step(2)
    end_soon(run)
    run.wait_for_attempts(1)
    run.wait_for_state("PENDING")
    run.cluster.run("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=10")
    again = run.first_step_at(1)
    end_soon(run)
    run.wait_for_attempts(2)
    ended = run.wait_for_state("FAILED", "COMPLETED", "TIMEOUT")
    assert ended.restarts == 1
    assert run.causes == ["time limit", "time limit"]
    assert "not requeued again: it was 1 times, which is the limit" in run.status.reason
    assert run.status.reason == ended.comment.removeprefix("tubeworks: ")
    assert mlflow_status(run.folder) == "KILLED"
    first, second = attempts_of(run.folder)
    assert first.ended is not None

    run.resubmit(time="10")
    assert run.wait_for_state("COMPLETED", "FAILED").state == "COMPLETED", run.told()
    assert attempts_of(run.folder)[2].from_step == second.to_step
    assert journal(run.folder) == whole
    assert mlflow_status(run.folder) == "FINISHED"
    results.append(
        {
            "scenario": "time limit, twice, then resubmitted",
            "saved at steps": [first.to_step, second.to_step],
            "from saved to the first step again, s": round(again - first.ended, 1),
            "losses equal the uninterrupted run": True,
        }
    )


def test_nodes_are_lost(
    cluster: Cluster, recipe_file: Path, runs: Path, results: Results, whole: Steps
) -> None:
    run = start(cluster, recipe_file, runs / "lost")
    run.wait_for_step(12)
    lost = time.time()
    cluster.lose_node("c2")
    try:
        again = run.first_step_at(1)
        assert slurm.expand_nodes(run.job.nodes) == ["c1", "c3"]
        for state in ("DOWN", "DRAIN"):  # down alone it would come back with its next sign of life
            cluster.run("scontrol", "update", "NodeName=c3", f"State={state}", "Reason=test")
        run.wait_for_state("PENDING")
        run.resubmit(nodes=1, ranks_per_node=2)
        assert run.wait_for_state("COMPLETED", "FAILED").state == "COMPLETED", run.told()
        assert run.job.nodes == "c1"
    finally:
        cluster.start_node("c2")  # comes back by itself: ReturnToService=2
        cluster.run("scontrol", "update", "NodeName=c3", "State=RESUME")
    assert set(run.causes[:-1]) <= {"lost", "crashed"}
    assert run.causes[-1] == "finished"
    assert journal(run.folder) == whole
    assert mlflow_status(run.folder) == "FINISHED"
    results.append(
        {
            "scenario": "a node lost its power; requeued on the others, then resubmitted on one",
            "first step again after s": round(again - lost, 1),
            "losses equal the uninterrupted run": True,
        }
    )


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_cancelled_stays_cancelled(
    cluster: Cluster, recipe_file: Path, runs: Path, results: Results, moment: str
) -> None:
    run = start(cluster, recipe_file, runs / f"cancelled-{moment}", file_pace=0.5)
    if moment == "before":
        run.wait_for_step(3)
    elif moment == "during":
        checkpoints = run.folder / "checkpoints"
        run.wait(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), "nothing is saved")
        assert not list(checkpoints.glob("step-*"))
    else:
        run.wait_for_step(11)
    cancelled = time.time()
    cluster.run("scancel", run.job_id)  # not ours: a person knows nothing of tubeworks
    run.wait_for_state("CANCELLED")
    took = seconds_since(cancelled)
    run.wait(lambda: mlflow_status(run.folder) == "KILLED", "MLflow does not say KILLED")
    time.sleep(7)  # a requeued job would have come back after cred_expire, which is 5 s here
    assert (run.job.state, run.job.restarts) == ("CANCELLED", 0)
    assert run.causes == ["cancelled"]
    assert run.status.state == "CANCELLED"
    results.append({"scenario": f"scancel {moment} a checkpoint", "ended after s": took, "restarts": 0})


def test_a_killed_rank_and_no_scontrol_for_the_ranks(
    cluster: Cluster, recipe_file: Path, runs: Path, results: Results, whole: Steps
) -> None:
    run = start(cluster, recipe_file, runs / "killed", site="environment: {PATH: /nowhere}\n")
    run.wait_for_step(4)
    cluster.run("scancel", "--signal=USR2", run.job_id)  # save and go on
    run.wait_for_step(14, attempt=1)
    nodes = slurm.expand_nodes(run.job.nodes)
    pids = run.processes(*nodes)
    assert len(pids) == 2
    killed = time.time()
    run.kill_rank(nodes[1])
    run.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "ranks do not leave")
    gone = seconds_since(killed)
    again = run.first_step_at(2)
    assert run.wait_for_state("COMPLETED", "FAILED").state == "COMPLETED", run.told()
    assert run.causes == ["signal", "crashed", "finished"]
    assert attempts_of(run.folder)[1].exit_code == 137
    assert journal(run.folder) == whole
    assert mlflow_status(run.folder) == "FINISHED"
    assert gone < 60
    results.append(
        {
            "scenario": "one rank killed",
            "all ranks gone after s": gone,
            "first step again after s": round(again - killed, 1),
            "losses equal the uninterrupted run": True,
        }
    )


def test_a_run_that_always_crashes(
    cluster: Cluster, recipe_file: Path, runs: Path, results: Results, tmp_path: Path
) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(recipe_file.parent / "shards", broken)
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(recipe_file.read_text().replace(str(recipe_file.parent / "shards"), str(broken)))
    damage(recipe, step=2)  # the third, counted from 0
    began = time.time()
    run = start(cluster, recipe, runs / "crashing", pace=0, site="max_crashes: 2\n")
    ended = run.wait_for_state("FAILED", "COMPLETED")
    assert ended.state == "FAILED"
    assert run.causes == ["crashed", "crashed"]
    assert max(journal(run.folder)) == 2
    said = cli("launch", "status", str(run.folder))
    assert "stopped by the crash-loop guard: 2 attempts in a row left no checkpoint newer than step 0" in said
    assert "checksum" in said
    assert ended.comment.startswith("tubeworks: stopped by the crash-loop guard")
    assert mlflow_status(run.folder) == "FAILED"
    results.append({"scenario": "crashes at step 3 every time", "given up after s": seconds_since(began)})


def damage(recipe_file: Path, step: int) -> None:
    """Flip a bit of one video that this step uses, and no step before it."""
    recipe = load_recipe(str(recipe_file)).recipe
    sources = open_sources(recipe)
    motion = sources["motion"]
    index = build_plan(recipe, sources).step(step)["motion"].index[0]
    sample = motion.manifest.sample(int(motion.selection[index]))
    with (Path(motion.source.path) / sample.shard).open("r+b") as file:
        file.seek(sample.offset + sample.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
