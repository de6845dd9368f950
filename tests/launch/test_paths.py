"""A submitted recipe means the same wherever its job starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import DataError, RecipeError
from framework.recipe import load_recipe
from framework.recipe.paths import with_absolute_paths
from launch.submission import Submission
from launch.submit import check_recipe


def test_every_path_of_a_recipe_is_absolute(tmp_path: Path) -> None:
    changes = ["init={image: {run: runs/vit}}", "tracking.uri=sqlite:///runs/mlflow.db"]
    changes += ["data.sources.k400.path=shards/train", "data.sources.k400.validation=s3://bucket/val"]
    found = with_absolute_paths(load_recipe("vivit_b_m1_k400", changes).recipe, tmp_path)
    assert found.init is not None
    assert found.init.image is not None
    assert found.init.image.run == str(tmp_path / "runs/vit")
    assert found.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    source = found.data.sources["k400"]
    assert (source.path, source.validation) == (str(tmp_path / "shards/train"), "s3://bucket/val")
    assert with_absolute_paths(found, tmp_path / "elsewhere") == found


def test_a_run_that_it_starts_from_must_be_there(tmp_path: Path) -> None:
    origin, submission = tmp_path / "vit", Submission(str(tmp_path / "run"), "video")
    changes = [f"init={{image: {{run: {origin}}}}}", f"data.sources.k400.path={tmp_path}/none"]
    recipe = load_recipe("vivit_b_m1_k400", changes).recipe
    with pytest.raises(RecipeError, match=f"init: {origin} is neither a run nor a checkpoint"):
        check_recipe(recipe, submission)
    origin.mkdir()
    (origin / "recipe.yaml").touch()
    with pytest.raises(DataError, match="none"):
        check_recipe(recipe, submission)


def test_shards_that_do_not_fit_the_recipe_are_no_job(tmp_path: Path) -> None:
    """It would wait in the queue for nothing: training refuses such shards at its start."""
    from data_tools.synth import SynthOptions, synthesize

    synthesize(SynthOptions(tmp_path / "set", 32, 16, 8, 2, 8, 2, 0, 1, False))
    recipe = tmp_path / "job.yaml"
    source = f"{{path: {tmp_path}/set/train, kind: image, classes: 10, size: 32}}"
    recipe.write_text(
        "name: job\nmodel: {name: vit_ti}\n"
        f"data: {{sources: {{digits: {source}}}, mixture: {{digits: 4}}}}\n"
        "optimizer: {lr: 1e-3}\ntrain: {steps: 10}\n"
    )
    submission = Submission(str(tmp_path / "run"), "job")
    check_recipe(load_recipe(str(recipe)).recipe, submission)
    with pytest.raises(DataError, match="has 10 classes, the recipe says 9"):
        check_recipe(load_recipe(str(recipe), ["data.sources.digits.classes=9"]).recipe, submission)
    held_out = load_recipe(str(recipe), [f"data.sources.digits.validation={tmp_path}/gone"]).recipe
    with pytest.raises(DataError, match="gone"):
        check_recipe(held_out, submission)
