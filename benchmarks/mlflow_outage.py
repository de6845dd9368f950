"""What an MLflow server that is killed and started again costs a training: time of steps, and points.

    python -m benchmarks.mlflow_outage --out benchmarks/results/mlflow_outage.json

A tiny model trains against a real `mlflow server` on this machine, which is killed and started again. The
times of the steps while it was up and dead stand side by side, and beside those of a training without MLflow.
`points` counts the journal's and MLflow's when the training has left, and after `tubeworks sync`, which has
something to do where the server was not back in time.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

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


def main() -> None:
    """Train twice, kill and restart the server in the second training, write the figures."""
    parser = argparse.ArgumentParser(description="What an MLflow server that is killed costs a training.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--outages", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options.steps, options.outages)
    result = {"machine": describe_machine(), "steps": options.steps, **found}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, steps: int, outages: int) -> dict[str, Any]:
    """Median seconds of a step in each phase, and how many points the journal and MLflow have."""
    from data_tools.synth import SynthOptions, synthesize

    synthesize(
        SynthOptions(
            folder / "shards",
            size=16,
            frames=4,
            train_videos=2,
            val_videos=2,
            train_images=64,
            val_images=10,
        )
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = start_server(folder, port)
    try:
        training = start_training(folder, "tracked", port, steps)
        marks = [("up", time.time())]
        for outage in range(outages):
            wait_for_step(training, folder / "tracked", steps * (2 * outage + 1) // (2 * outages + 1))
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            marks.append(("dead", time.time()))
            wait_for_step(training, folder / "tracked", steps * (2 * outage + 2) // (2 * outages + 1))
            marks.append(("starting", time.time()))  # which takes processor time of its own
            server = start_server(folder, port)
            marks.append(("up", time.time()))
        if training.wait() != 0:
            raise RuntimeError((folder / "tracked.log").read_text()[-2000:])
        points = count_points(folder / "tracked", port)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    alone = start_training(folder, "alone", None, steps)
    if alone.wait() != 0:
        raise RuntimeError((folder / "alone.log").read_text()[-2000:])
    phases: dict[str, list[float]] = {name: [] for name, _ in marks}
    for when, seconds in steps_of(folder / "tracked")[10:]:
        phases[[name for name, began in marks if began <= when][-1]].append(seconds)
    phases["no_mlflow"] = [seconds for _, seconds in steps_of(folder / "alone")[10:]]
    figures = {name: summary(values) for name, values in phases.items() if len(values) > 20}
    return {"step_ms": figures, "outages": outages, **points}


def summary(seconds: list[float]) -> dict[str, float]:
    """Number, fastest tenth and median in milliseconds; the fastest tells least of others on the machine."""
    tenths = statistics.quantiles(seconds, n=10)
    return {"steps": len(seconds), "tenth": round(tenths[0] * 1e3, 2), "median": round(tenths[4] * 1e3, 2)}


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


def start_training(folder: Path, name: str, port: int | None, steps: int) -> subprocess.Popen[bytes]:
    """Start `tubeworks train` on one rank, with MLflow on that port or without."""
    recipe = folder / f"{name}.yaml"
    uri = f"http://127.0.0.1:{port}"
    mlflow = str(port is not None).lower()
    recipe.write_text(RECIPE.format(shards=folder / "shards", steps=steps, mlflow=mlflow, uri=uri))
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe), "--run", str(folder / name)]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def wait_for_step(training: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """Wait until the journal has this step."""
    while len(steps_of(run)) < step:
        if training.poll() is not None:
            raise RuntimeError((run.parent / f"{run.name}.log").read_text()[-2000:])
        time.sleep(0.2)


def steps_of(run: Path) -> list[tuple[float, float]]:
    """Time and seconds of every logged step."""
    from framework.tracking.journal import journal_path, parse_line

    path = journal_path(run)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    entries = [entry for line in lines if (entry := parse_line(line)) is not None]
    return [(e.time, value) for e in entries if (value := e.metrics.get("perf/step_s")) is not None]


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
        "points": {"journal": len(steps_of(run)), "at_the_end": at_the_end, "after_sync": synced},
        "doubled": len(history) - len({point.step for point in history}),
        "status": client.get_run(run_id).info.status,
    }


if __name__ == "__main__":
    main()
