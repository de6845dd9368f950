"""What an MLflow server that is killed and started again costs a training: time of its loop, and points.

    python -m benchmarks.mlflow_outage --out benchmarks/results/mlflow_outage.json

Two trainings of the same tiny recipe run beside each other on this machine: one recorded by a real `mlflow
server`, one without MLflow. The server is killed (SIGKILL), stays away, and is started again over the same
store. Two things are measured in each phase:

- `recording_us`: what the loops themselves spend on recording in a step, in microseconds, by the clock and in
  processor time of their own thread (see `recorder_time`). Were the server waited for, the clock would show
  it here, in the tracked training alone: a refused connection costs milliseconds, a silent server seconds.
  `mlflow_adds_us` is the difference of the medians by the clock.
- `median_step_ms`, `mean_step_ms`: of both trainings' steps in the same seconds, and the ratios.

The trainings run side by side, so that whatever else the machine does hits both. All of it is done twice:
with the server on a core of its own, as on a cluster, where it is another machine (both trainings, and the
process that mirrors one of them, have the others), and with everything on all cores. Trainings on one core
both feel what else is done there: `processor_share_of_a_core` tells how much that is.
`points` counts the journal's and MLflow's when the training has left, and after `tubeworks sync`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe_machine
from benchmarks.recorder_time import read_times
from framework.tracking.journal import journal_path, parse_line
from framework.tracking.sender import load_state

RECIPE = """\
name: outage
model:
  name: tubevit_ti
  width: 32
  depth: 1
  heads: 2
  mlp_width: 64
  tubes: [{{kernel: [1, 8, 8], stride: [4, 8, 8]}}]
data:
  sources: {{digits: {{path: {shards}/train, kind: image, classes: 10, size: 16}}}}
  mixture: {{digits: 8}}
  workers: 0
optimizer: {{lr: 1e-3}}
train: {{steps: {steps}, log_every: 1}}
engine: {{zero: 1, precision: fp32, bucket_mb: 1}}
checkpoint: {{every: 100000}}
tracking: {{mlflow: {mlflow}, uri: "{uri}", system_metrics: false}}
"""


Times = dict[int, tuple[float, float, float]]

STEPS = 1_000_000
"""More than are ever made: the trainings are stopped."""


def main() -> None:
    """Train twice side by side, kill and restart the server meanwhile, write the figures."""
    parser = argparse.ArgumentParser(description="What an MLflow server that is killed costs a training.")
    parser.add_argument("--steps", type=int, default=400, help="of each training in each phase, at least")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    found = {}
    for layout, ranks, server in (
        ("server on a core of its own", cores[:-1], cores[-1:]),
        ("all on the same cores", cores, cores),
    ):
        with tempfile.TemporaryDirectory() as name:
            found[layout] = measure(Path(name), options.steps, ranks, server)
        sys.stdout.write(json.dumps({layout: found[layout]}, indent=1) + "\n")
        sys.stdout.flush()
    command = f"python -m benchmarks.mlflow_outage --steps {options.steps}"
    result = {"command": command, "machine": describe_machine(), "log_every": 1, **found}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def on(cores: Collection[int]) -> Iterator[None]:
    """What is started meanwhile runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(
    folder: Path, steps: int, rank_cores: Collection[int], server_cores: Collection[int]
) -> dict[str, Any]:
    """The figures of each phase, and how many points the journal and MLflow have."""
    make_shards(folder / "shards")
    port = free_port()
    with on(server_cores):
        server = start_server(folder, port)
    with on(rank_cores):
        tracked, alone = start_training(folder, "tracked", port), start_training(folder, "alone", None)
    marks: list[Mark] = []
    began = time.time()

    def mark(name: str) -> None:
        """A phase begins."""
        mirrors = [
            one for one in psutil.Process(tracked.pid).children() if "tracking" in " ".join(one.cmdline())
        ]
        servers = [psutil.Process(server.pid)] if server.poll() is None else []
        spent = {"mirror": processor_seconds(mirrors), "server": processor_seconds(servers)}
        marks.append(Mark(name, time.time(), spent))

    def make_steps(least: int) -> None:
        """Let both trainings make so many steps."""
        for training, run in ((tracked, folder / "tracked"), (alone, folder / "alone")):
            wait_for(training, run, lambda run=run, first=last_step(run): last_step(run) >= first + least)

    try:
        mark("start")  # the first steps are slower
        make_steps(20)
        wait_for(tracked, folder / "tracked", lambda: caught_up(folder / "tracked", began))
        mark("server up")
        make_steps(steps)
        mark("server dead")
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        make_steps(steps)
        mark("server starts")  # which takes processor time of its own
        with on(server_cores):
            server = start_server(folder, port)
        mark("server takes in what had piled up")
        wait_for(tracked, folder / "tracked", lambda: caught_up(folder / "tracked", began))
        mark("server up again")
        make_steps(steps)
        mark("end")
        stop(folder, tracked, alone)
        points = count_points(folder / "tracked", port)
    finally:
        for process in (server, tracked, alone):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"phases": figures(folder, marks), **points}


def make_shards(folder: Path) -> None:
    """Tiny shards, so that a step is short and what is beside it shows."""
    from data_tools.synth import SynthOptions, synthesize

    synthesize(
        SynthOptions(folder, size=16, frames=4, train_videos=2, val_videos=2, train_images=64, val_images=10)
    )


def free_port() -> int:
    """A port of the loopback that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Mark:
    """The begin of a phase, and the processor seconds of the mirror and of the server until then."""

    name: str
    at: float
    spent: dict[str, float]


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    """Processor time so far, of all that they have started as well."""
    times = [one.cpu_times() for root in processes for one in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def figures(folder: Path, marks: Sequence[Mark]) -> dict[str, Any]:
    """What both trainings did in each phase."""
    tracked, alone = read_times(folder / "tracked.times"), read_times(folder / "alone.times")
    found = {}
    for first, last in itertools.pairwise(marks):
        name, began, ended = first.name, first.at, last.at
        if name == "start":
            continue
        both = {
            run: {step: row for step, row in times.items() if began <= row[0] < ended}
            for run, times in (("tracked", tracked), ("without_mlflow", alone))
        }
        gaps = {run: seconds_of_steps(rows) for run, rows in both.items()}
        medians = {run: statistics.median(values) for run, values in gaps.items()}
        means = {run: statistics.fmean(values) for run, values in gaps.items()}
        found[name] = {
            "seconds": round(ended - began, 1),
            "processor_share_of_a_core": {
                what: round(max(0.0, seconds - first.spent[what]) / (ended - began), 3)
                for what, seconds in last.spent.items()
            },
            "steps": {run: len(rows) for run, rows in both.items()},
            "recording_us": (spent := {run: recording(rows) for run, rows in both.items()}),
            "mlflow_adds_us": spent["tracked"]["clock"]["median"]
            - spent["without_mlflow"]["clock"]["median"],
            "median_step_ms": {run: round(value * 1e3, 2) for run, value in medians.items()},
            "ratio_of_medians": round(medians["tracked"] / medians["without_mlflow"], 3),
            "mean_step_ms": {run: round(value * 1e3, 2) for run, value in means.items()},
            "ratio_of_means": round(means["tracked"] / means["without_mlflow"], 3),
        }
    return found


def seconds_of_steps(rows: Times) -> list[float]:
    """Seconds from the end of each step to that of the next."""
    return [after[0] - before[0] for before, after in itertools.pairwise(rows.values())]


def recording(rows: Times) -> dict[str, dict[str, int]]:
    """Median, 99th percentile and largest, in microseconds, by the clock and in processor time."""
    found = {}
    for name, column in (("clock", 1), ("processor", 2)):
        seconds = [row[column] for row in rows.values()]
        cuts = statistics.quantiles(seconds, n=100)
        values = {"median": cuts[49], "p99": cuts[98], "max": max(seconds)}
        found[name] = {label: round(value * 1e6) for label, value in values.items()}
    return found


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start `mlflow server` over the same store, and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError((folder / "server.log").read_text()[-2000:])


def start_training(folder: Path, name: str, port: int | None) -> subprocess.Popen[bytes]:
    """Start a training on one rank that writes down its times, with MLflow on that port or without."""
    recipe = folder / f"{name}.yaml"
    uri = f"http://127.0.0.1:{port}"
    mlflow = str(port is not None).lower()
    recipe.write_text(RECIPE.format(shards=folder / "shards", steps=STEPS, mlflow=mlflow, uri=uri))
    command = [sys.executable, "-m", "benchmarks.recorder_time", "train", str(recipe)]
    environment = {**os.environ, "RECORDER_TIMES": str(folder / f"{name}.times"), "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--run", str(folder / name)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for(training: subprocess.Popen[bytes], run: Path, reached: Callable[[], bool]) -> None:
    """Wait for something that a training does."""
    while not reached():
        if training.poll() is not None:
            raise RuntimeError((run.parent / f"{run.name}.log").read_text()[-2000:])
        time.sleep(0.5)


def stop(folder: Path, *trainings: subprocess.Popen[bytes]) -> None:
    """Ask the trainings to save and leave, as an operator does."""
    for training in trainings:
        training.send_signal(signal.SIGTERM)
    for training in trainings:
        if training.wait() != 128 + signal.SIGTERM:
            raise RuntimeError("".join(path.read_text()[-2000:] for path in folder.glob("*.log")))


def last_step(run: Path) -> int:
    """The last step in the journal; 0 before there is one."""
    path = journal_path(run)
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        lines = file.read().splitlines(keepends=True)[1:]  # the first is cut, or says how the attempt began
    entries = [entry for line in lines if (entry := parse_line(line))]
    return entries[-1].step if entries else 0


def caught_up(run: Path, began: float) -> bool:
    """Whether MLflow has the journal but for the last seconds; the mirror looks at it every two."""
    if not (run / "mlflow.json").is_file():
        return False
    size = journal_path(run).stat().st_size
    return size - int(load_state(run)["offset"]) < 5 * size / (time.time() - began)


def count_points(run: Path, port: int) -> dict[str, Any]:
    """Points of the loss in the journal and in MLflow, and the status there, after the last was sent."""
    from mlflow import MlflowClient

    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(f"http://127.0.0.1:{port}")
    at_the_end = len({point.step for point in client.get_metric_history(run_id, "train/loss")})
    subprocess.run([sys.executable, "-m", "launch.cli", "sync", str(run)], check=True)
    history = client.get_metric_history(run_id, "train/loss")
    synced = len({point.step for point in history})
    return {
        "points": {"journal": last_step(run), "at_the_end": at_the_end, "after_sync": synced},
        "doubled": len(history) - len({point.step for point in history}),
        "status": client.get_run(run_id).info.status,
    }


if __name__ == "__main__":
    main()
