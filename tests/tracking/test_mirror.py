"""MLflow holds what the journal holds: each point once, whatever happened in between (real sqlite stores)."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from framework.errors import TubeworksError
from framework.recipe import dump_yaml
from framework.recipe.schema import Recipe
from framework.tracking import Journal, MlflowMirror, RunInfo, sync_run
from framework.tracking.lock import RunLock
from framework.tracking.mirror import settings_of
from framework.tracking.sender import POINTS_PER_CALL, Sender, batches, load_state

MakeRecipe = Callable[..., Recipe]
Points = Callable[..., dict[str, list[tuple[int, int, float]]]]
CLEAN = {"commit": "c0ffee", "branch": "work", "dirty": "false"}


def store(run: Path) -> str:
    return f"sqlite:///{run.parent / 'mlflow.db'}"


def mlflow_run(run: Path) -> Run:
    return MlflowClient(tracking_uri=store(run)).get_run(load_state(run)["run_id"])


def train(run: Path, recipe: Recipe, info: RunInfo, steps: range, status: Any = "FINISHED") -> bool:
    """An attempt without a model."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    mirror = MlflowMirror(run, recipe, info, poll_seconds=0.2)
    mirror.start()
    with Journal(run, info.attempt, steps.start) as journal:
        for step in steps:
            journal.write(step + 1, {"train/loss": 1 / (step + 1), "top@1": step / 100})
    return mirror.close(status, timeout=120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe_for: MakeRecipe) -> Path:
    """A run of two attempts, the second with a changed value, and a file of each kind."""
    run = tmp_path_factory.mktemp("runs") / "moving"
    (run / "pictures").mkdir(parents=True)
    (run / "pictures" / "sheet.png").write_bytes(b"first")
    (run / "pictures" / "notes.txt").write_text("not an artifact")
    hashes = {"digits": "ab" * 16}
    info = RunInfo(attempt=0, world_size=2, plan_hash="feed", manifests=hashes, git=CLEAN, host="here")
    assert train(run, recipe_for(), info, range(30), "KILLED")
    (run / "pictures" / "sheet.png").write_bytes(b"second, longer")
    (run / "evaluations").mkdir()
    (run / "evaluations" / "step-00000050.json").write_text("{}")
    changed = recipe_for(train={"steps": 100, "log_every": 5})
    info = RunInfo(attempt=1, world_size=4, plan_hash="feed", manifests=hashes, git=CLEAN, host="there")
    assert train(run, changed, info, range(20, 50))
    return run


def test_every_point_is_there_once(finished: Path, points_in: Points, points_of_mlflow: Points) -> None:
    expected = points_in(finished)
    assert len(expected["train/loss"]) == 60
    assert points_of_mlflow(store(finished), load_state(finished)["run_id"]) == expected


def test_both_attempts_are_one_mlflow_run(finished: Path) -> None:
    client = MlflowClient(tracking_uri=store(finished))
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tracked (moving)"
    assert run.info.status == "FINISHED"


def test_parameters_are_those_of_the_recipe_and_changes_are_tags(finished: Path) -> None:
    data = mlflow_run(finished).data
    assert data.params["optimizer.lr"] == "0.001"
    assert data.params["data.mixture.digits"] == "8"
    assert data.params["train.log_every"] == "10"
    assert data.tags["attempt.1.train.log_every"] == "5"
    assert "attempt.1.train.steps" not in data.tags


def test_tags_say_which_code_data_and_machines(finished: Path) -> None:
    tags = mlflow_run(finished).data.tags
    assert tags["git.commit"] == tags["mlflow.source.git.commit"] == "c0ffee"
    assert tags["git.branch"] == "work"
    assert tags["manifest.digits"] == "ab" * 16
    assert tags["plan_hash"] == "feed"
    assert (tags["world_size"], tags["attempt.1.world_size"]) == ("4", "4")
    assert tags["attempt.1.host"] == "there"
    assert tags["mlflow.user"]
    assert "Digits that move." in tags["mlflow.note.content"]
    assert "motion top-1" in tags["mlflow.note.content"]


def test_manifests_are_the_datasets_of_the_run(finished: Path) -> None:
    (dataset,) = mlflow_run(finished).inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "ab" * 16)


def test_artifacts_are_the_newest_files(finished: Path) -> None:
    client, run_id = MlflowClient(tracking_uri=store(finished)), load_state(finished)["run_id"]
    names = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert names == {"recipe.yaml", "journal.jsonl", "pictures", "evaluations"}
    assert [a.path for a in client.list_artifacts(run_id, "pictures")] == ["pictures/sheet.png"]
    root = Path(mlflow_run(finished).info.artifact_uri.removeprefix("file://"))
    assert root.is_relative_to(finished.parent / "mlartifacts")
    assert (root / "pictures" / "sheet.png").read_bytes() == b"second, longer"
    assert (root / "journal.jsonl").read_bytes() == (finished / "journal.jsonl").read_bytes()


def test_training_does_not_import_mlflow(runs: Path, recipe_for: MakeRecipe) -> None:
    (runs / "recipe.json").write_text(recipe_for().model_dump_json())
    code = (
        "import sys; from pathlib import Path\n"
        "from framework.recipe.schema import Recipe\n"
        "from framework.tracking import Journal, MlflowMirror, RunInfo\n"
        "folder = Path(sys.argv[1]); run = folder / 'run'\n"
        "recipe = Recipe.model_validate_json((folder / 'recipe.json').read_text())\n"
        "mirror = MlflowMirror(run, recipe, RunInfo(git={})); mirror.start()\n"
        "Journal(run, 0).write(1, {'loss': 1.0})\n"
        "assert mirror.close('FINISHED', 120)\n"
        "assert not {'mlflow', 'torch', 'sqlalchemy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(runs)], check=True)


def test_a_killed_training_is_marked_and_complete(
    runs: Path, recipe_for: MakeRecipe, points_in: Points, points_of_mlflow: Points
) -> None:
    """SIGKILL leaves nobody to close the mirror: it sees the end itself, and the next attempt goes on."""
    run = runs / "run"
    (runs / "recipe.json").write_text(recipe_for().model_dump_json())
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from framework.recipe.schema import Recipe\n"
        "from framework.tracking import Journal, MlflowMirror, RunInfo\n"
        "folder = Path(sys.argv[1]); run = folder / 'run'\n"
        "recipe = Recipe.model_validate_json((folder / 'recipe.json').read_text())\n"
        "MlflowMirror(run, recipe, RunInfo(git={}), 0.2).start()\n"
        "journal = Journal(run, 0, 0)\n"
        "for step in range(200): journal.write(step, {'train/loss': 1 / (step + 1)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(runs)], check=False).returncode == -signal.SIGKILL
    # started at once, while the first attempt's mirror may still be sending: it waits for its turn
    assert train(run, recipe_for(), RunInfo(attempt=1, git={}), range(150, 160), "KILLED")
    state = load_state(run)
    assert points_of_mlflow(store(run), state["run_id"]) == points_in(run)
    assert mlflow_run(run).info.status == "KILLED"
    experiment = mlflow_run(run).info.experiment_id
    assert len(MlflowClient(tracking_uri=store(run)).search_runs([experiment])) == 1


def test_numbers_that_are_not_finite_are_counted_and_named(runs: Path, recipe_for: MakeRecipe) -> None:
    run = runs / "run"
    with Journal(run, 0) as journal:
        journal.write(3, {"train/loss": math.nan, "train/gradient": math.inf, "train/lr": 0.1})
    (run / "recipe.yaml").write_text(dump_yaml(recipe_for()))
    sync_run(run)
    data = mlflow_run(run).data
    assert data.metrics == {"train/nonfinite": 2.0, "train/lr": 0.1}
    assert data.tags["train.nonfinite"] == "step 3: train/loss, train/gradient"


def test_sending_again_from_the_start_doubles_nothing(
    finished: Path, points_in: Points, points_of_mlflow: Points
) -> None:
    """The answer to a call may be lost after the server took it: the same lines are then sent again."""
    state = load_state(finished)
    client = MlflowClient(tracking_uri=store(finished))
    client.set_tag(state["run_id"], "tubeworks.offset", "0")
    report = sync_run(finished)
    assert report.points > 100
    assert report.bytes == (finished / "journal.jsonl").stat().st_size
    assert points_of_mlflow(store(finished), state["run_id"]) == points_in(finished)


def test_a_run_folder_that_forgot_its_mlflow_run_finds_it_again(runs: Path, recipe_for: MakeRecipe) -> None:
    """As after a kill between the creation of the MLflow run and the note of its id."""
    run = runs / "run"
    assert train(run, recipe_for(), RunInfo(git={}), range(5))
    state = json.loads((run / "mlflow.json").read_text())
    (run / "mlflow.json").write_text(json.dumps({**state, "run_id": None, "offset": 0}))
    assert sync_run(run).run_id == state["run_id"]


def test_a_lost_database_is_filled_again(
    runs: Path, recipe_for: MakeRecipe, points_in: Points, points_of_mlflow: Points
) -> None:
    run = runs / "run"
    assert train(run, recipe_for(), RunInfo(git={}), range(5))
    before = load_state(run)["run_id"]
    (runs / "mlflow.db").unlink()
    report = sync_run(run)
    assert report.run_id != before
    assert points_of_mlflow(store(run), report.run_id) == points_in(run)


def test_a_moved_folder_takes_its_store_along(
    runs: Path, recipe_for: MakeRecipe, points_in: Points, points_of_mlflow: Points
) -> None:
    (runs / "before").mkdir()
    (runs / "mlflow.db").rename(runs / "before" / "mlflow.db")
    assert train(runs / "before" / "run", recipe_for(), RunInfo(git={}), range(5))
    (runs / "before").rename(runs / "after")
    run = runs / "after" / "run"
    with Journal(run, 0) as journal:
        journal.write(9, {"eval/top_1": 0.5})
    report = sync_run(run)
    assert report.points == 1
    assert points_of_mlflow(store(run), report.run_id) == points_in(run)


def test_the_command_says_what_was_sent(runs: Path, recipe_for: MakeRecipe) -> None:
    run = runs / "run"
    with Journal(run, 0) as journal:
        journal.write(1, {"train/loss": 1.0})
    (run / "recipe.yaml").write_text(dump_yaml(recipe_for()))
    command = [sys.executable, "-m", "launch.cli", "sync"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, check=True)
    assert f"sent 1 point and 1 file of {run}" in done.stdout
    refused = subprocess.run([*command, str(runs)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "not the folder of a run" in refused.stderr


def test_syncing_a_run_that_is_being_sent_is_refused(runs: Path, recipe_for: MakeRecipe) -> None:
    run = runs / "run"
    Journal(run, 0).close()
    (run / "recipe.yaml").write_text(dump_yaml(recipe_for()))
    held = RunLock(run)
    assert held.acquire()
    with pytest.raises(TubeworksError, match="right now"):
        sync_run(run)
    held.release()
    assert sync_run(run).points == 0


def test_a_recipe_without_mlflow_starts_nothing(tmp_path: Path, recipe_for: MakeRecipe) -> None:
    run = tmp_path / "run"
    assert train(run, recipe_for(tracking={"mlflow": False}), RunInfo(git={}), range(2))
    assert not (tmp_path / "mlflow.db").exists()


def test_uncommitted_changes_are_kept_beside_the_run(
    runs: Path, recipe_for: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.tracking.mirror.git_diff", lambda: "--- a\n+++ b\n")
    run = runs / "run"
    assert train(run, recipe_for(), RunInfo(git={**CLEAN, "dirty": "true"}), range(1))
    names = {a.path for a in MlflowClient(tracking_uri=store(run)).list_artifacts(load_state(run)["run_id"])}
    assert "git.diff" in names


def test_a_mirror_that_dies_is_reported_and_costs_nothing(
    runs: Path, recipe_for: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs / "run"
    mirror = MlflowMirror(run, recipe_for(), RunInfo(git={}), poll_seconds=0.2)
    mirror.start()
    os.kill(mirror._process.pid, signal.SIGKILL)
    with Journal(run, 0) as journal:
        journal.write(1, {"train/loss": 1.0})
    assert mirror.close("FAILED", timeout=30) is False
    assert f"tubeworks sync {run}" in caplog.text
    (run / "recipe.yaml").write_text(dump_yaml(recipe_for()))
    assert sync_run(run).points == 1
    assert mlflow_run(run).info.status == "FAILED"


def test_signals_of_the_job_do_not_end_the_mirror(runs: Path, recipe_for: MakeRecipe) -> None:
    """Slurm signals every process of a step; the mirror must outlive the training's last lines."""
    run = runs / "run"
    mirror = MlflowMirror(run, recipe_for(), RunInfo(git={}), poll_seconds=0.2)
    mirror.start()
    deadline = time.monotonic() + 60
    while not (run / "mlflow.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(mirror._process.pid, number)
    with Journal(run, 0) as journal:
        journal.write(1, {"train/loss": 1.0})
    assert mirror.close("FINISHED", timeout=120)


def test_lines_are_cut_into_calls_that_mlflow_takes() -> None:
    lines = [
        json.dumps(
            {"step": step, "time": 1.0, "attempt": 0, "metrics": {f"m{n}": 1.0 for n in range(count)}}
        ).encode()
        + b"\n"
        for step, count in enumerate([1, 300, 300, 300, 5 * POINTS_PER_CALL + 1, 0, 7])
    ]
    calls = list(batches(lines, offset=100))
    assert all(len(call.points) <= POINTS_PER_CALL for call in calls)
    assert sum(len(call.points) for call in calls) == 1 + 900 + 5 * POINTS_PER_CALL + 1 + 7
    assert calls[-1].offset == 100 + sum(map(len, lines))
    # an offset is only told together with, or after, all points of the lines before it
    sent = 0
    for call in calls:
        sent += len(call.points)
        if call.offset is not None:
            behind = [json.loads(line) for line in b"".join(lines)[: call.offset - 100].splitlines()]
            assert sum(len(line["metrics"]) for line in behind) <= sent


def test_passwords_are_not_written_into_the_run_folder(runs: Path, recipe_for: MakeRecipe) -> None:
    uri = "http://someone:secret@127.0.0.1:9/"
    recipe = recipe_for(uri)
    mirror = MlflowMirror(runs / "run", recipe, RunInfo(git={}), poll_seconds=0.2)
    mirror.start()
    mirror.close("FINISHED", timeout=60)
    for path in (runs / "run").rglob("*"):
        if path.is_file():
            assert "secret" not in path.read_text(), path
    assert "secret" not in json.dumps(settings_of(runs, recipe, RunInfo(git={})).params)


def test_passwords_do_not_reach_the_artifacts(runs: Path, recipe_for: MakeRecipe) -> None:
    run = runs / "run"
    Journal(run, 0).close()
    recipe = recipe_for("http://someone:secret@example.org/")
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    sender = Sender(settings_of(run, recipe_for(), RunInfo(git={})))
    sender.connect()
    assert sender.send_files() == 1
    root = Path(mlflow_run(run).info.artifact_uri.removeprefix("file://"))
    text = (root / "recipe.yaml").read_text()
    assert "http://***@example.org/" in text
    assert "secret" not in text
    assert "secret" in (run / "recipe.yaml").read_text(), "the run itself still needs it"


def test_a_deleted_experiment_is_explained(runs: Path, recipe_for: MakeRecipe) -> None:
    run = runs / "run"
    assert train(run, recipe_for(), RunInfo(git={}), range(1))
    client = MlflowClient(tracking_uri=store(run))
    client.delete_experiment(mlflow_run(run).info.experiment_id)
    sender = Sender(settings_of(runs / "other", recipe_for(), RunInfo(git={})))
    with pytest.raises(TubeworksError, match="mlflow experiments restore"):
        sender.connect()
