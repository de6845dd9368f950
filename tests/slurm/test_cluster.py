"""The Slurm that the other tests use is one: three hosts, names that resolve, jobs that run again."""

from __future__ import annotations

import pytest
from cluster import NODES, Cluster, wait_until


def test_tasks_run_on_three_hosts(cluster: Cluster) -> None:
    said = cluster.run("srun", "--nodes=3", "--ntasks=3", "bash", "-c", "echo $SLURMD_NODENAME $(hostname)")
    rows = sorted(line.split() for line in said.splitlines())
    assert [node for node, _ in rows] == list(NODES)
    if cluster.namespaces:
        assert [host for _, host in rows] == list(NODES)
        resolved = cluster.run("srun", "--nodes=1", "--nodelist=c3", "getent", "hosts", "c1")
        assert resolved.split()[0] == "127.0.1.1"


def test_devices_are_given_to_jobs(cluster: Cluster) -> None:
    if not cluster.gpus:
        pytest.skip("this kernel lets nobody make devices; the other tests ask for CPUs only")
    said = cluster.run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert said.strip() == "0,1"


def test_a_requeued_job_runs_again_soon(cluster: Cluster) -> None:
    said = cluster.run("sbatch", "--parsable", "--requeue", "--output=/dev/null", "--wrap=sleep 100")
    job = said.strip()
    wait_until(lambda: cluster.job(job)["JobState"] == "RUNNING", 30, "the job does not start")
    cluster.run("scontrol", "requeue", job)
    wait_until(
        lambda: (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("RUNNING", "1"),
        60,
        "the requeued job does not start again",
    )
