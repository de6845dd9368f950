"""A recipe without data, and a real MLflow server that can be killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.recipe.schema import Recipe


def make_recipe(uri: str | None = None, **overrides: object) -> Recipe:
    values = {
        "name": "tracked",
        "description": "Digits that move.",
        "published": {"motion top-1": "99 %"},
        "model": {"name": "tubevit_ti"},
        "data": {
            "sources": {"digits": {"path": "shards", "kind": "image", "classes": 10}},
            "mixture": {"digits": 8},
        },
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 100},
        "tracking": {"uri": uri, "experiment": "tests"},
    }
    return Recipe.model_validate({**values, **overrides})


class Server:
    """`mlflow server` on the loopback with a sqlite store; killing it kills everything that it started."""

    def __init__(self, folder: Path, empty_store: Path) -> None:
        self.folder = folder
        shutil.copy(empty_store, folder / "server.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> None:
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + seconds
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mlflow server: {(self.folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make; copied where a test needs one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    """A folder for run folders, with the store that lies beside them by default."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("mlflow"), empty_store)
    running.start()
    yield running
    running.kill()


@pytest.fixture
def own_server(tmp_path: Path, empty_store: Path) -> Iterator[Server]:
    """A server that the test may kill; not started."""
    mine = Server(tmp_path, empty_store)
    yield mine
    mine.kill()


@pytest.fixture(scope="session")
def recipe_for() -> Callable[..., Recipe]:
    return make_recipe


@pytest.fixture(scope="session")
def points_in() -> Callable[[Path], dict[str, list[tuple[int, int, float]]]]:
    """What MLflow should hold of a run: metric -> (step, milliseconds, value), straight from the lines."""

    def expected(run: Path) -> dict[str, list[tuple[int, int, float]]]:
        points: dict[str, list[tuple[int, int, float]]] = {}
        for line in map(json.loads, (run / "journal.jsonl").read_text().splitlines()):
            time = int(line["time"] * 1000)
            values = {name.replace("@", "_"): v for name, v in line["metrics"].items() if v is not None}
            if "nonfinite" in line:
                values["train/nonfinite"] = len(line["nonfinite"])
            if line["attempt"] and any(name.startswith("train/") for name in values):
                values["train/attempt"] = line["attempt"]
            for name, value in values.items():
                points.setdefault(name, []).append((line["step"], time, value))
        return {name: sorted(found) for name, found in points.items()}

    return expected


@pytest.fixture(scope="session")
def points_of_mlflow() -> Callable[[str, str], dict[str, list[tuple[int, int, float]]]]:
    """What MLflow does hold: every point of every metric of a run."""

    def found(uri: str, run_id: str) -> dict[str, list[tuple[int, int, float]]]:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        return {
            name: sorted(
                (point.step, point.timestamp, point.value)
                for point in client.get_metric_history(run_id, name)
            )
            for name in client.get_run(run_id).data.metrics
        }

    return found
