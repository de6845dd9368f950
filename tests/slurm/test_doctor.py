"""`tubeworks launch doctor` on a real Slurm, and on the settings of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cluster import Cluster

from launch import slurm
from launch.doctor import Finding, examine, show_findings
from launch.partitions import partitions
from launch.site import Site


def by_setting(findings: list[Finding]) -> dict[str, Finding]:
    return {one.setting: one for one in findings}


def test_what_it_says_of_this_cluster(cluster: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("")
    command = [sys.executable, "-m", "launch.cli", "launch", "doctor", "--site", str(site), "--json"]
    found = {one["setting"]: one for one in json.loads(subprocess.check_output(command, timeout=120))}
    assert found["AuthInfo"]["value"] == "cred_expire=5"
    assert "waits 5 s" in found["AuthInfo"]["meaning"]
    assert "SIGUSR2 first" in found["SlurmctldParameters"]["meaning"]
    assert found["AccountingStorageType"]["level"] == "note"
    assert (found["KillWait"]["value"], found["KillWait"]["level"]) == ("30 sec", "good")
    assert "60 s to save" in found["partition low: GraceTime"]["meaning"]
    assert "partition high: GraceTime" not in found  # it is never preempted
    assert all(one["level"] != "change" for one in found.values())


def test_settings_that_lose_work(cluster: Cluster) -> None:
    """The same cluster, as it would be with Slurm's defaults."""
    known = [one for one in partitions() if one.name == "low"]
    settings = {**slurm.configuration(), "KillWait": "5 sec", "AuthInfo": "(null)", "SlurmctldParameters": ""}
    hasty = [type(one)(**{**vars(one), "grace_seconds": 0, "preempt_mode": "CANCEL"}) for one in known]
    found = by_setting(examine(settings, hasty, Site()))
    assert "120 s" in found["AuthInfo"].meaning
    assert "SIGTERM only" in found["SlurmctldParameters"].meaning
    wrong = [name for name, one in found.items() if one.level == "change"]
    assert wrong == ["KillWait", "partition low: PreemptMode", "partition low: GraceTime"]
    lines = show_findings(list(found.values())).splitlines()
    assert lines[0].startswith("CHANGE  KillWait = 5 sec: ")
    assert lines[1] == f"        -> {found['KillWait'].advice}"
    calm = by_setting(examine({**settings, "PreemptType": "preempt/none"}, hasty, Site()))
    assert "SlurmctldParameters" not in calm
    assert not any("PreemptMode" in name for name in calm)
