"""Runs whose jobs the controller has forgotten: what became of them says `sacct`, on a real slurmdbd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from accounts import AccountedCluster, missing_accounts
from cluster import missing_reason, wait_until

from launch import slurm
from launch.status import runs_of_user, show_list, show_status, status_of
from launch.submission import Submission, write_submission


@dataclass
class Forgotten:
    """The cluster, the folder of the runs, and when their first job was submitted."""

    cluster: AccountedCluster
    runs: Path
    began: float

    def run(self, name: str) -> Path:
        """The folder of one run."""
        return self.runs / name


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forgotten]:
    """Runs with real jobs that have ended, and that the controller knows no more."""
    if reason := missing_reason() or missing_accounts():
        pytest.skip(f"no accounting here: {reason}")
    cluster, runs, began = AccountedCluster(), tmp_path_factory.mktemp("runs"), time.time()
    ready = False
    try:
        cluster.start()
        with patch.dict(os.environ, cluster.environment):
            submit_all(cluster, runs)
            ready = True
            yield Forgotten(cluster, runs, began)
    finally:
        cluster.stop(keep=not ready)


def submit(cluster: AccountedCluster, run: Path, *options: str, command: str, element: str = "") -> str:
    """A job that works in the folder of a run, as far as Slurm can see."""
    (run / "code").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: tiny\nmodel: {name: vit_ti}\ntrain: {steps: 40}\n" + DATA)
    fixed = ("--parsable", "--output=/dev/null", f"--chdir={run}/code", "--requeue")
    job_id = cluster.run("sbatch", *fixed, *options, f"--wrap={command}").strip() + element
    write_submission(Submission(run=str(run), name="tiny", job_id=job_id))
    return job_id


DATA = """\
data:
  sources: {digits: {path: shards, kind: image, classes: 10, size: 16}}
  mixture: {digits: 8}
optimizer: {lr: 1e-3}
"""


def submit_all(cluster: AccountedCluster, runs: Path) -> None:
    """One job for each end that there is, and wait until all are forgotten."""
    twice = '[ "$SLURM_RESTART_COUNT" ] && exit 4; sleep 300'
    again = submit(cluster, runs / "again", "--nodes=1", command=twice)
    cancelled = submit(cluster, runs / "cancelled", "--nodelist=c2", command="sleep 300")
    failed = submit(cluster, runs / "failed", "--nodes=2", command="exit 3")
    waits = ("--array=0-1", "--dependency=afterok:" + cancelled)
    array = submit(cluster, runs / "waited", *waits, command="true", element="_1")
    for job_id in (again, cancelled):
        wait_until(lambda job_id=job_id: slurm.show_job(job_id).state == "RUNNING", 30, f"{job_id} waits")
    cluster.run("scontrol", "requeue", again)
    cluster.run("scancel", array.partition("_")[0])
    cluster.run("scancel", cancelled)

    def known(job_id: str) -> bool:
        try:
            return bool(slurm.show_job(job_id))
        except slurm.UnknownJob:
            return False

    for job_id in (failed, cancelled, array, again):
        wait_until(lambda job_id=job_id: not known(job_id), 90, f"{job_id} is not forgotten", every=0.3)


def cli(*arguments: str) -> str:
    command = [sys.executable, "-m", "launch.cli", "launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_job_that_failed(forgotten: Forgotten) -> None:
    found = status_of(forgotten.run("failed"))
    assert (found.state, found.exit_code, found.nodes, found.active) == ("FAILED", "3:0", "c[1-2]", False)
    assert found.started is not None
    assert found.ended is not None
    assert forgotten.began - 1 <= found.started <= found.ended <= time.time()
    assert "FAILED on c[1-2]" in show_status(found)
    assert "exit code 3:0" in show_status(found)


def test_who_cancelled_a_job(forgotten: Forgotten) -> None:
    found = json.loads(cli("status", str(forgotten.run("cancelled")), "--json"))
    assert (found["state"], found["reason"], found["nodes"]) == ("CANCELLED", "cancelled by root", "c2")
    assert found["accounting"][-1]["cancelled_by"] == "root"


def test_an_element_of_an_array_that_never_ran(forgotten: Forgotten) -> None:
    found = status_of(forgotten.run("waited"))
    assert (found.state, found.reason, found.nodes) == ("CANCELLED", "cancelled by root", "")


def test_every_attempt_of_a_requeued_job(forgotten: Forgotten) -> None:
    found = status_of(forgotten.run("again"))
    assert found.accounting is not None
    assert [one.state for one in found.accounting] == ["REQUEUED", "FAILED"]
    assert (found.state, found.exit_code) == ("FAILED", "4:0")


def test_a_list_asks_once(forgotten: Forgotten, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    run = slurm.run
    monkeypatch.setattr(slurm, "run", lambda *words, **more: asked.append(words) or run(*words, **more))
    found = runs_of_user([forgotten.runs])
    states = {Path(one.run).name: one.state for one in found}
    ended = {"again": "FAILED", "cancelled": "CANCELLED", "failed": "FAILED", "waited": "CANCELLED"}
    assert ended.items() <= states.items()
    assert "CANCELLED" in show_list(found)
    assert [words[0] for words in asked].count("sacct") == 1


def test_watching_ends_although_nobody_knows_the_job(forgotten: Forgotten) -> None:
    assert "FAILED" in cli("status", str(forgotten.run("failed")), "--watch")


def test_a_number_that_was_given_twice(forgotten: Forgotten) -> None:
    """The job of another run with the same number, as after a cluster's counter has begun again."""
    run = forgotten.run("other")
    (run / "launch").mkdir(parents=True)
    (run / "recipe.yaml").write_text((forgotten.run("failed") / "recipe.yaml").read_text())
    job_id = json.loads((forgotten.run("failed") / "launch" / "submission.json").read_text())["job_id"]
    write_submission(Submission(run=str(run), name="tiny", job_id=job_id))
    found = status_of(run)
    assert (found.state, found.exit_code, found.accounting) == ("unknown", "", [])


def test_accounting_that_is_down(forgotten: Forgotten) -> None:
    forgotten.cluster.stop_daemons("slurmdbd")
    try:
        found = status_of(forgotten.run("failed"))
    finally:
        forgotten.cluster.start_slurmdbd()
    assert (found.state, found.accounting) == ("unknown", None)
    assert status_of(forgotten.run("failed")).state == "FAILED"
