"""One real Slurm for all tests of this folder; see `cluster`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests import `cluster` by its name

from cluster import Cluster, missing_reason
from runs import RECIPE, STEPS, environment, journal

from data_tools.synth import SynthOptions, synthesize


@pytest.fixture(scope="session")
def slurm_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three hosts, one controller; its `SLURM_CONF` is in the environment while the tests run."""
    reason = missing_reason()
    if reason:
        pytest.skip(f"no Slurm here: {reason}")
    failed_before = request.session.testsfailed
    cluster = Cluster(namespaces=False if os.environ.get("TUBEWORKS_TEST_NO_NAMESPACES") else None)
    before = os.environ.get("SLURM_CONF")
    ready = False
    try:
        cluster.start()
        os.environ.update(cluster.environment)
        ready = True
        yield cluster
    finally:
        failed = not ready or request.session.testsfailed > failed_before
        cluster.stop(keep=failed)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        if failed:
            sys.stderr.write(f"\nthe logs of Slurm are in {cluster.folder}/log\n")


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with nothing running before and after the test."""
    yield slurm_cluster
    slurm_cluster.clear()


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe and its shards."""
    folder = tmp_path_factory.mktemp("tiny")
    counts = {"train_videos": 24, "val_videos": 8, "train_images": 24, "val_images": 10}
    synthesize(SynthOptions(folder / "shards", size=16, frames=6, **counts))
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(shards=folder / "shards"))
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with one MLflow store beside them."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def whole(recipe_file: Path, runs: Path) -> dict[int, dict[str, float]]:
    """What every step of an uninterrupted run on two ranks gives, here without Slurm: `submit --local`."""
    command = [sys.executable, "-m", "launch.cli", "launch", "submit", str(recipe_file), "--local", "--json"]
    done = subprocess.run(
        [*command, "--ranks-per-node", "2", "--run", str(runs / "whole")],
        env={**os.environ, **environment(pace=0.0)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["run"], said["job_id"], said["exit_code"]) == (str(runs / "whole"), None, 0)
    steps = journal(runs / "whole")
    assert sorted(steps) == list(range(1, STEPS + 1))
    return steps


@pytest.fixture(scope="session")
def results() -> Iterator[list[dict[str, object]]]:
    """What was done and how long it took; written down where `TUBEWORKS_SLURM_RESULTS` says."""
    found: list[dict[str, object]] = []
    yield found
    if path := os.environ.get("TUBEWORKS_SLURM_RESULTS"):
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
