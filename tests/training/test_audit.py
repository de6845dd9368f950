"""The ledger of real trainings, killed at any moment and gone on with on other numbers of ranks."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from rank_processes import start_training, train_to_end, wait_for_step
from typer.testing import CliRunner

from framework.data.ledger import ledger_path
from launch.cli import app


def audit(run: Path) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["data", "audit", str(run), "--json"])
    return result.exit_code, json.loads(result.stdout) if result.stdout.startswith("{") else {}


def test_a_run_that_was_killed_and_came_back_on_other_ranks_is_exactly_once(
    recipe_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    longer = ("train.steps=13", "checkpoint.every=4")
    for ranks, reached in ((2, 6), (4, 9)):
        job = start_training(recipe_file, run, ranks, *longer, "data.workers=1")
        wait_for_step(job, run, reached)
        job.send(signal.SIGKILL)
        job.wait()
    job = start_training(recipe_file, run, 1, *longer)
    wait_for_step(job, run, 10)
    job.send(signal.SIGTERM)
    job.wait()
    train_to_end(recipe_file, run, 2, *longer)
    code, found = audit(run)
    assert (code, found["problems"], found["exactly_once"]) == (0, [], True)
    assert (found["steps"], found["attempts"], found["order"]) == (13, 4, "checked")
    for source in ("motion", "digits"):
        epochs = found["sources"][source]["epochs"]
        assert [epoch["fed"] for epoch in epochs] == [24, 24, 24, 24, 8], "13 steps of 8 over 24 samples"
        assert [epoch["complete"] for epoch in epochs] == [True] * 4 + [False]
    said = CliRunner().invoke(app, ["data", "audit", str(run)])
    assert said.stdout.splitlines()[-1] == "every good sample exactly once in every epoch"


def test_repeated_samples_count_once(recipe_file: Path, tmp_path: Path) -> None:
    """8 rows a step are 4 clips; a run that is killed and comes back on other ranks stays exactly once."""
    run = tmp_path / "run"
    settings = ("data.sources.motion.repeats=2", "checkpoint.every=2", "train.steps=8")
    job = start_training(recipe_file, run, 2, *settings)
    wait_for_step(job, run, 5)
    job.send(signal.SIGKILL)
    job.wait()
    train_to_end(recipe_file, run, 1, *settings)
    code, found = audit(run)
    assert (code, found["problems"], found["order"]) == (0, [], "checked")
    fed = {
        source: [epoch["fed"] for epoch in found["sources"][source]["epochs"]]
        for source in ("motion", "digits")
    }
    assert fed == {"motion": [24, 8], "digits": [24, 24, 16]}


def test_a_ledger_that_lacks_what_a_checkpoint_holds_is_a_problem(run_copy: Path) -> None:
    assert audit(run_copy)[0] == 0
    data = ledger_path(run_copy).read_bytes()
    ledger_path(run_copy).write_bytes(data[:-3])
    code, found = audit(run_copy)
    assert code == 3
    assert found["problems"] == ["there is a checkpoint of step 6, but the ledger ends with step 3"]
    ledger_path(run_copy).write_bytes(b"")
    code, found = audit(run_copy)
    assert (code, found["order"]) == (3, "not checked: the ledger has no steps")


def test_without_its_shards_a_run_is_still_audited(
    recipe_file: Path, shards: Path, tmp_path: Path, run_copy: Path
) -> None:
    recipe = run_copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(shards), str(tmp_path / "gone")))
    code, found = audit(run_copy)
    assert code == 0
    assert found["order"].startswith("not checked: ")


@pytest.mark.parametrize("what", ["ledger", "run"])
def test_no_ledger_is_an_error_with_advice(what: str, run_copy: Path) -> None:
    ledger_path(run_copy).unlink()
    if what == "run":
        shutil.rmtree(run_copy)
    result = CliRunner().invoke(app, ["data", "audit", str(run_copy)])
    assert result.exit_code == 3
    assert ("kept no ledger" if what == "ledger" else "not the folder of a run") in result.output
