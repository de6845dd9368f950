"""A slow, dead or dying server costs training nothing, and MLflow no point (a real `mlflow server`)."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from framework.errors import TubeworksError
from framework.recipe import dump_yaml
from framework.recipe.schema import Recipe
from framework.tracking import Journal, MlflowMirror, RunInfo, sync_run
from framework.tracking.sender import load_state

MakeRecipe = Callable[..., Recipe]
Points = Callable[..., dict[str, list[tuple[int, int, float]]]]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_misses_and_doubles_no_point(
    tmp_path: Path,
    own_server: Any,
    recipe_for: MakeRecipe,
    points_in: Points,
    points_of_mlflow: Points,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    own_server.start()
    run, recipe = tmp_path / "run", recipe_for(own_server.uri)
    mirror = MlflowMirror(run, recipe, RunInfo(git={}), poll_seconds=0.2)
    mirror.start()
    journal = Journal(run, 0, 0)
    step = 0

    def write(count: int) -> None:
        nonlocal step
        for _ in range(count):
            step += 1
            journal.write(step, {"train/loss": 1 / step, "perf/rate": float(step)})
            time.sleep(0.002)

    write(300)
    wait_for(lambda: load_state(run)["offset"] > 0)
    write(300)
    own_server.kill()  # in the middle of sending
    write(300)
    wait_for(lambda: "cannot be reached" in caplog.text)
    write(300)
    own_server.start()
    write(300)
    wait_for(lambda: "answers again after" in caplog.text)
    journal.close()
    assert mirror.close("FINISHED", timeout=120)

    state = load_state(run)
    assert points_of_mlflow(own_server.uri, state["run_id"]) == points_in(run)
    assert len(points_in(run)["train/loss"]) == 1500
    assert MlflowClient(tracking_uri=own_server.uri).get_run(state["run_id"]).info.status == "FINISHED"
    (warning,) = [r.getMessage() for r in caplog.records if "cannot be reached" in r.getMessage()]
    # Killed between two calls it refuses the next; killed in the middle of one, that one breaks.
    reasons = "Connection (refused|broken|aborted|reset)|Remote end closed connection"
    assert re.search(reasons, warning), "one warning per outage, with the reason"
    assert caplog.text.count("answers again after") == 1


@pytest.mark.slow
def test_a_server_that_is_dead_from_the_start_gets_everything_later(
    tmp_path: Path,
    own_server: Any,
    recipe_for: MakeRecipe,
    points_in: Points,
    points_of_mlflow: Points,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, recipe = tmp_path / "run", recipe_for(own_server.uri)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    mirror = MlflowMirror(run, recipe, RunInfo(git={}, tags={"slurm.job": "7"}), poll_seconds=0.2)
    mirror.start()
    with Journal(run, 0, 0) as journal:
        for step in range(100):
            journal.write(step, {"train/loss": 1.0 / (step + 1)})
    assert mirror.close("FINISHED", timeout=120) is False
    assert f"tubeworks sync {run}" in caplog.text
    with pytest.raises(TubeworksError, match="Nothing is lost"):
        sync_run(run)
    own_server.start()
    report = sync_run(run)
    assert points_of_mlflow(own_server.uri, report.run_id) == points_in(run)
    found = MlflowClient(tracking_uri=own_server.uri).get_run(report.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["slurm.job"] == "7"
    assert found.data.params["optimizer.lr"] == "0.001"
    again = sync_run(run)
    assert (again.points, again.files) == (0, 0)


def test_a_server_that_accepts_and_never_answers_holds_nobody(tmp_path: Path, recipe_for: MakeRecipe) -> None:
    """The journal is written by this process alone, so only `close` could wait: it ends in time."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = tmp_path / "run"
        mirror = MlflowMirror(run, recipe_for(uri), RunInfo(git={}), poll_seconds=0.2)
        mirror.start()
        process = mirror._process
        with Journal(run, 0) as journal:
            for step in range(10):
                journal.write(step, {"train/loss": 1.0})
        connection, _ = silent.accept()  # it is talking to us, and waits
        assert process.poll() is None
        assert mirror.close("FINISHED", timeout=1.0) is False
        assert process.poll() is not None, "the mirror has ended"
        connection.close()
    assert load_state(run)["status"] == "FINISHED", "`tubeworks sync` will set it"
