"""A submitted recipe means the same wherever its job starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.recipe import load_recipe
from launch.submit import with_absolute_paths


def test_every_path_of_a_recipe_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["init={image: {run: runs/vit}}", "tracking.uri=sqlite:///runs/mlflow.db"]
    changes += ["data.sources.k400.path=shards/train", "data.sources.k400.validation=s3://bucket/val"]
    found = with_absolute_paths(load_recipe("vivit_b_m1_k400", changes).recipe)
    assert found.init is not None
    assert found.init.image is not None
    assert found.init.image.run == str(tmp_path / "runs/vit")
    assert found.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    source = found.data.sources["k400"]
    assert (source.path, source.validation) == (str(tmp_path / "shards/train"), "s3://bucket/val")
    assert with_absolute_paths(found) == found
