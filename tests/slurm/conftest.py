"""One real Slurm for all tests of this folder; see `cluster`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests import `cluster` by its name

from cluster import Cluster, missing_reason


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
