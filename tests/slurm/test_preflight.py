"""The pre-flight on a real Slurm: a bad node is found, avoided, and the job runs elsewhere by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cluster import Cluster
from runs import STEPS, SlurmRun, journal, mlflow_status, start

from launch import slurm
from launch.bad_nodes import avoided_nodes, bad_nodes
from launch.submission import attempts_of


def reports(run: SlurmRun, restart: int = 0) -> dict[str, Any]:
    folder = run.folder / "launch" / "preflight" / f"{run.job_id}-{restart}"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_a_node_whose_scratch_is_full_is_left_by_itself(
    cluster: Cluster,
    recipe_file: Path,
    runs: Path,
    whole: dict[int, dict[str, float]],
    tmp_path: Path,
    results: list[dict[str, object]],
) -> None:
    """Nobody does anything after the submission."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    good, broken = scratch / "good", scratch / "c1"
    good.mkdir()
    broken.symlink_to("/proc")  # c1's own disk takes no files
    for node in ("c2", "c3"):
        (scratch / node).symlink_to(good)
    mine = f"touch {scratch}/$SLURMD_NODENAME/probe"
    run = start(cluster, recipe_file, runs / "bad-node", pace=0.0, site=f"preflight:\n  checks: ['{mine}']\n")
    run.wait_for_state("COMPLETED")

    assert run.causes == ["bad node", "finished"]
    first, second = attempts_of(run.folder)
    assert "c1" in slurm.expand_nodes(first.nodes)
    assert sorted(slurm.expand_nodes(second.nodes)) == ["c2", "c3"]
    assert "c1: `touch" in first.note
    assert run.job.restarts == 1
    assert "c1" in slurm.expand_nodes(run.job.excluded)
    (bad,) = bad_nodes(run.folder)
    assert (bad.node, bad.job_id) == ("c1", run.job_id)
    assert abs(bad.until - time.time() - 24 * 3600) < 1800
    assert bad_nodes(run.folder, now=bad.until + 1) == []
    assert avoided_nodes(run.folder) == ["c1"]
    # the ranks never started on c1, and trained elsewhere as if nothing had been
    assert journal(run.folder) == whole
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert mlflow_status(run.folder) == "FINISHED"

    found = reports(run, restart=1)
    assert sorted(found) == ["c2", "c3"]
    for report in found.values():
        assert report["at"] == "done"
        names = [check["name"].split()[0] for check in report["checks"]]
        assert names == ["run", "scratch", "shards", "site:", "meeting", "clock", "all-reduce"]
        assert [check["problem"] for check in report["checks"]] == [""] * len(names)
    assert second.began is not None
    assert first.ended is not None
    results.append({"scenario": "bad pre-flight", "seconds_to_running": round(second.began - first.ended, 1)})


def test_all_nodes_fail_and_none_is_blamed(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    """What is wrong everywhere is not a node's fault: the run is given up and says why."""
    site = "max_crashes: 1\npreflight: {scratch_gb: 1.0e+9}\n"
    run = start(cluster, recipe_file, tmp_path / "all", "tracking.mlflow=false", site=site, pace=0.0)
    run.wait_for_state("FAILED")
    assert run.causes == ["crashed"]
    assert "all nodes fail" in run.status.reason
    assert "c2: /tmp has" in attempts_of(run.folder)[0].note
    assert bad_nodes(run.folder) == []
    assert not (run.folder / "journal.jsonl").exists()
