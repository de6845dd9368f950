"""`launch.slurm` against a real Slurm: what it reads, what it refuses, and what its errors say."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from cluster import Cluster, wait_until

from framework.errors import SchedulerError
from launch import slurm


def submit(cluster: Cluster, *options: str, command: str = "sleep 60") -> str:
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={command}").strip()


def wait_for(job_id: str, state: str) -> slurm.Job:
    wait_until(lambda: slurm.show_job(job_id).state == state, 30, f"job {job_id} is not {state}")
    return slurm.show_job(job_id)


def test_a_job_from_the_queue_to_its_end(cluster: Cluster) -> None:
    job_id = submit(cluster, "--job-name=first", "--nodes=2", "--requeue", "--time=5", "--comment=a = b c=d")
    running = wait_for(job_id, "RUNNING")
    assert (running.name, running.partition, running.node_count) == ("first", "low", 2)
    assert running.comment == "a = b c=d"
    assert slurm.expand_nodes(running.nodes) == ["c1", "c2"]
    assert running.requeues
    assert (running.restarts, running.preempted, running.has_ended) == (0, None, False)
    assert running.started is not None
    assert running.ends == running.started + 300
    assert abs(running.started - time.time()) < 60
    assert [job.job_id for job in slurm.jobs_of_user()] == [job_id]

    slurm.set_comment(job_id, "stopped:\nthree attempts")
    assert slurm.show_job(job_id).comment == "stopped: three attempts"
    slurm.requeue(job_id)
    waiting = wait_for(job_id, "PENDING")
    assert waiting.restarts == 1
    slurm.exclude_nodes(job_id, ["c2"])
    slurm.exclude_nodes(job_id, ["c1"])
    assert slurm.expand_nodes(slurm.show_job(job_id).excluded) == ["c1", "c2"]
    slurm.cancel(job_id)
    ended = wait_for(job_id, "CANCELLED")
    assert ended.has_ended
    assert slurm.jobs_of_user() == []
    assert job_id in [job.job_id for job in slurm.jobs_of_user(ended=True)]


def test_elements_of_an_array(cluster: Cluster) -> None:
    array = submit(cluster, "--array=0-1", "--requeue")
    element = wait_for(f"{array}_1", "RUNNING")
    assert element.job_id == f"{array}_1"
    slurm.requeue(f"{array}_1")
    assert wait_for(f"{array}_1", "PENDING").restarts == 1
    assert slurm.show_job(f"{array}_0").restarts == 0
    environment = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "1"}
    assert slurm.own_job_id(environment) == f"{array}_1"
    assert slurm.own_job_id({"SLURM_JOB_ID": "9"}) == "9"
    assert slurm.own_job_id({}) is None


def test_nodes_and_settings(cluster: Cluster) -> None:
    facts = slurm.node_facts("c2")
    assert (facts["NodeName"], facts["Port"]) == ("c2", str(cluster._node_ports["c2"]))
    assert slurm.configuration()["SlurmctldParameters"] == "preempt_send_user_signal"
    assert slurm.past_jobs("1") is None  # this cluster keeps no accounts


def test_estimates(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --time=1\ntrue\n")
    found = slurm.estimate(script)
    assert slurm.expand_nodes(found.nodes) == ["c1", "c2"]
    assert found.start is not None
    assert abs(found.start - time.time()) < 60
    script.write_text("#!/bin/bash\n#SBATCH --partition=no-such\ntrue\n")
    with pytest.raises(SchedulerError, match="invalid partition specified: no-such"):
        slurm.estimate(script)


def test_what_errors_say(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(slurm.UnknownJob, match="does not know job 4242"):
        slurm.show_job("4242")
    with pytest.raises(slurm.UnknownJob):
        slurm.requeue("4242")
    job_id = submit(cluster, "--no-requeue", command="true")
    with pytest.raises(SchedulerError, match=f"scontrol requeue {job_id}"):
        slurm.requeue(job_id)

    # a controller that takes the call and says nothing
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        text = cluster.configuration.read_text()
        port = f"SlurmctldPort={silent.getsockname()[1]}"
        deaf = tmp_path / "slurm.conf"
        deaf.write_text(text.replace(f"SlurmctldPort={cluster._controller_port}", port))
        with monkeypatch.context() as patched:
            patched.setenv("SLURM_CONF", str(deaf))
            with pytest.raises(slurm.SlurmDown, match="no answer after 1 s"):
                slurm.run("scontrol", "show", "job", seconds=1)
            deaf.write_text("")
            with pytest.raises(slurm.SlurmMissing, match="they find no cluster"):
                slurm.jobs_of_user()
            patched.setenv("PATH", str(tmp_path))
            with pytest.raises(slurm.SlurmMissing, match="no `squeue` on this machine"):
                slurm.jobs_of_user()
            assert not slurm.is_available()
