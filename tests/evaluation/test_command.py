"""`tubeworks eval` on a run that was really trained (for two steps)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

from framework.errors import CheckpointError, DataError, RecipeError, TubeworksError
from framework.exchange.evaluate import evaluate_command, parse_views
from framework.recipe import dump_yaml
from framework.recipe.schema import Evaluation, Recipe
from framework.tracking import read_journal


def tubeworks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_of: Callable[..., Recipe]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(dump_yaml(recipe_of()))
    done = tubeworks("train", str(folder / "small.yaml"), "--run", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def ordered(run: Path) -> dict[str, Any]:
    """The command's JSON with two ranks."""
    done = tubeworks("eval", str(run), "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_is_the_whole_output_and_is_kept(run: Path, ordered: dict[str, Any]) -> None:
    assert ordered["step"] == 2
    assert ordered["weights"] == "ema"
    assert ordered["ranks"] == 2
    assert {name: result["samples"] for name, result in ordered["sources"].items()} == {
        "motion": 11,
        "digits": 13,
    }
    assert json.loads((run / "evaluations" / "step-00000002-ema.json").read_text()) == ordered


def test_one_rank_agrees_with_two(
    run: Path, ordered: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_command(run, as_json=True)
    alone = json.loads(capsys.readouterr().out)
    for name, result in ordered["sources"].items():
        assert alone["sources"][name] == pytest.approx(result, abs=1e-5)


def test_numbers_are_in_the_journal_and_in_mlflow(run: Path, ordered: dict[str, Any]) -> None:
    metrics = {name: value for entry in read_journal(run) for name, value in entry.metrics.items()}
    assert metrics["eval_ema/motion/top_1"] == ordered["sources"]["motion"]["top1"]
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["eval_ema/motion/top_1"] == ordered["sources"]["motion"]["top1"]
    pictures = {artifact.path for artifact in client.list_artifacts(run_id, "pictures")}
    assert {"pictures/predictions-motion.png", "pictures/predictions-digits.png"} <= pictures
    assert [a.path for a in client.list_artifacts(run_id, "evaluations")]


def test_pictures_show_the_predictions(run: Path, ordered: dict[str, Any]) -> None:
    for name in ("motion", "digits"):
        with Image.open(run / "pictures" / f"predictions-{name}.png") as picture:
            assert picture.width > 300
            assert picture.height > 300


def test_raw_weights_other_views_and_shuffled_frames_are_kept_apart(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_command(run, views="3x1", shuffle_frames=True, weights="raw")
    table = capsys.readouterr().out
    assert "3x1 views" in table
    assert "frames shuffled" in table
    assert (run / "evaluations" / "step-00000002-3x1-shuffled.json").is_file()
    assert (run / "pictures" / "predictions-motion-shuffled.png").is_file()
    names = {name for entry in read_journal(run) for name in entry.metrics}
    assert "eval_3x1_shuffled/motion/top_1" in names


def test_raw_weights_repeat_the_evaluation_at_the_end_of_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = next(e.metrics for e in read_journal(run) if "eval/motion/loss" in e.metrics)
    evaluate_command(run, weights="raw", as_json=True)
    again = json.loads(capsys.readouterr().out)["sources"]
    assert again["motion"]["loss"] == pytest.approx(trained["eval/motion/loss"], rel=1e-5)
    assert again["digits"]["loss"] == pytest.approx(trained["eval/digits/loss"], rel=1e-5)


@pytest.mark.parametrize("views", ["4", "0x3", "4x2", "x", "-1x3", "4x3x1", "²x1", "100000x1"])
def test_views_that_do_not_exist_are_explained(views: str) -> None:
    with pytest.raises(RecipeError, match="such as 4x3"):
        parse_views(views, Evaluation())


def test_views_are_temporal_times_spatial() -> None:
    found = parse_views("8x1", Evaluation())
    assert (found.temporal_views, found.spatial_views) == (8, 1)
    assert parse_views(None, Evaluation()) == Evaluation()


def test_what_is_not_there_is_explained(run: Path, tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    with pytest.raises(TubeworksError, match="not the folder of a run"):
        evaluate_command(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe_of()))
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        evaluate_command(tmp_path)
    data = recipe_of().data.model_dump()
    data["sources"]["motion"]["validation"] = None
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe_of(data=data)))
    with pytest.raises(DataError, match=r"sources of \S+ \(digits\) have one frame a sample"):
        evaluate_command(tmp_path, shuffle_frames=True)
    data["sources"]["digits"]["validation"] = None
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe_of(data=data)))
    with pytest.raises(DataError, match=r"data\.sources\.NAME\.validation"):
        evaluate_command(tmp_path)
    with pytest.raises(RecipeError, match="ema or raw"):
        evaluate_command(run, weights="best")


def test_ranks_that_contradict_the_environment_are_refused(run: Path) -> None:
    with pytest.raises(TubeworksError, match="--ranks 3 does not fit"):
        evaluate_command(run, ranks=3)
