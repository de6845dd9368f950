"""What the scenarios share: submit a tiny run, wait for what it does, and compare it with another."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cluster import Cluster, wait_until

from launch import slurm
from launch.status import RunStatus, status_of
from launch.submission import attempts_of, read_submission
from launch.submit import prepare_run, resubmit, submit_prepared
from launch.wishes import Wishes

STEPS = 40
RECIPE = """\
name: tiny
seed: 3
model:
  name: tubevit_ti
  width: 32
  depth: 1
  heads: 2
  mlp_width: 64
  tubes:
    - {{kernel: [2, 8, 8], stride: [2, 8, 8]}}
    - {{kernel: [1, 8, 8], stride: [4, 8, 8]}}
data:
  sources:
    motion:
      path: {shards}/train
      kind: video
      classes: 8
      size: 16
      clip: {{frames: 4, stride: 1}}
    digits: {{path: {shards}/train, kind: image, classes: 10, size: 16}}
  mixture: {{motion: 8, digits: 8}}
  block: 16
  workers: 0
optimizer: {{lr: 1e-3}}
train: {{steps: 40, log_every: 1, ema_decay: 0.9}}
schedule: {{warmup: 2}}
engine: {{zero: 1, precision: fp32, bucket_mb: 1}}
checkpoint: {{every: 10, keep: 20}}
tracking: {{system_metrics: false}}
"""
PATIENCE = 300.0
"""Seconds until a tiny run must have started, on a machine with much else to do."""


@dataclass
class SlurmRun:
    """A run that was submitted to the cluster of the tests."""

    cluster: Cluster
    folder: Path

    @property
    def status(self) -> RunStatus:
        """What `tubeworks launch status` knows."""
        return status_of(self.folder)

    @property
    def job(self) -> slurm.Job:
        """The job that works on the run."""
        return slurm.show_job(self.job_id)

    @property
    def job_id(self) -> str:
        """Its id; a resubmitted run has another."""
        job_id = read_submission(self.folder).job_id
        assert job_id is not None
        return job_id

    @property
    def causes(self) -> list[str | None]:
        """How the attempts ended."""
        return [attempt.cause for attempt in attempts_of(self.folder)]

    def step(self) -> int:
        """The last step in the journal."""
        steps = journal(self.folder)
        return max(steps, default=0)

    def wait_for_step(self, step: int, attempt: int = 0) -> None:
        """Wait until an attempt (or a later one) has made this step."""
        entries = self.folder / "journal.jsonl"

        def reached() -> bool:
            ended = self.job.has_ended  # asked first: it may reach the step and end between the two
            found = any(
                entry["step"] >= step and entry.get("attempt", 0) >= attempt
                for entry in _entries(entries)
                if "train/loss" in entry["metrics"]
            )
            assert found or not ended, "the job has ended"
            return found

        self.wait(reached, f"step {step} of attempt {attempt} was not reached")

    def first_step_at(self, attempt: int) -> float:
        """Wait until an attempt (or a later one) has made a step; when it was, in seconds since the epoch."""
        self.wait_for_step(1, attempt)
        return min(
            entry["time"]
            for entry in _entries(self.folder / "journal.jsonl")
            if entry.get("attempt", 0) >= attempt and "train/loss" in entry["metrics"]
        )

    def wait_for_state(self, *states: str) -> slurm.Job:
        """Wait until the job is in one of these states."""
        self.wait(lambda: self.job.state in states, f"the job is not {' or '.join(states)}")
        return self.job

    def wait_for_attempts(self, count: int) -> None:
        """Wait until so many attempts have ended."""
        self.wait(lambda: len([one for one in self.causes if one]) >= count, f"{count} attempts did not end")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for anything; if it does not come, the failure shows what there is."""
        try:
            wait_until(condition, PATIENCE, what, every=0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def told(self) -> str:
        """Everything that a person would look at."""
        logs = [f"--- {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in self._logs()]
        job = self.cluster.run("scontrol", "show", "job", self.job_id)
        return "\n".join([json.dumps(self.status.as_dict(), indent=1, default=str), job, *logs])

    def resubmit(self, pace: float = 0.0, **wishes: Any) -> None:
        """`tubeworks launch resubmit`."""
        with patch.dict(os.environ, environment(pace)):
            resubmit(self.folder, Wishes(**wishes))

    def processes(self, *nodes: str) -> list[int]:
        """The ranks on these hosts, without what they have forked."""
        found: dict[int, int] = {}
        for node in nodes:
            for pid in self.cluster.processes_of(node):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"launch.task" in words and b"srun" not in words[0]:
                    found[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return [pid for pid, parent in found.items() if parent not in found]

    def kill_rank(self, node: str) -> None:
        """What the kernel does when memory runs out."""
        os.kill(self.processes(node)[0], signal.SIGKILL)

    def _logs(self) -> list[Path]:
        return sorted((self.folder / "logs").glob("*.log"))


def environment(pace: float, file_pace: float = 0.0) -> dict[str, str]:
    """What jobs inherit: few threads, and the pace of their steps."""
    root = Path(__file__).resolve().parent.parent.parent
    return {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent / "pace"), str(root)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TEST_STEP_SECONDS": str(pace),
        "TEST_FILE_SECONDS": str(file_pace),
        "TEST_PHASES": os.environ.get("TEST_PHASES", ""),
    }


def start(
    cluster: Cluster,
    recipe: Path,
    folder: Path,
    *overrides: str,
    pace: float = 0.1,
    file_pace: float = 0.0,
    site: str = "",
    **wishes: Any,
) -> SlurmRun:
    """`tubeworks launch submit`, by default two nodes with one rank each."""
    asked = {"nodes": 2, "ranks_per_node": 1, "partition": "low", "time": "10", **wishes}
    site_file = folder.with_name(f"{folder.name}-site.yaml")
    # the pre-flight has tests of its own
    site_file.write_text(site if "preflight:" in site else f"{site}preflight: {{enabled: false}}\n")
    with patch.dict(os.environ, environment(pace, file_pace)):
        submit_prepared(prepare_run(str(recipe), overrides, Wishes(**asked), site_file, folder))
    return SlurmRun(cluster, folder)


def journal(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of every step as the last attempt wrote them, times and rates left out."""
    steps: dict[int, dict[str, float]] = {}
    for entry in _entries(run / "journal.jsonl"):
        kept = {key: value for key, value in entry["metrics"].items() if key.startswith("train/")}
        if kept:
            steps[entry["step"]] = kept
    return steps


def mlflow_status(run: Path) -> str:
    """What MLflow itself says of a run: RUNNING, FINISHED, KILLED, …"""
    from mlflow import MlflowClient

    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    return MlflowClient(f"sqlite:///{run.parent}/mlflow.db").get_run(run_id).info.status


def mlflow_losses(run: Path) -> dict[int, float]:
    """The losses that MLflow has, by step."""
    from mlflow import MlflowClient

    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    points = MlflowClient(f"sqlite:///{run.parent}/mlflow.db").get_metric_history(run_id, "train/loss")
    return {point.step: point.value for point in points}


def seconds_since(moment: float) -> float:
    """For the results: rounded."""
    return round(time.time() - moment, 1)


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:  # being written
            continue
    return entries
