"""A small joint data set of real encoded clips and images, and a recipe over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.synth import SynthOptions, synthesize
from framework.recipe.schema import Recipe


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` and `val`; the held-out counts are divided by no number of ranks that is tried."""
    out = tmp_path_factory.mktemp("data") / "shards"
    synthesize(SynthOptions(out=out, train_videos=8, val_videos=11, train_images=8, val_images=13))
    return out


@pytest.fixture(scope="session")
def recipe_of(shards: Path) -> Callable[..., Recipe]:
    """A recipe of seconds; keyword arguments replace its sections."""

    def make(**sections: Any) -> Recipe:
        both = {"path": str(shards / "train"), "validation": str(shards / "val"), "size": 32}
        values = {
            "name": "small",
            "model": {
                "name": "tubevit_ti",
                "depth": 1,
                "tubes": [
                    {"kernel": [4, 16, 16], "stride": [4, 16, 16]},
                    {"kernel": [1, 16, 16], "stride": [8, 16, 16]},
                ],
            },
            "data": {
                "sources": {
                    "motion": {**both, "kind": "video", "classes": 8, "clip": {"frames": 8, "stride": 1}},
                    "digits": {**both, "kind": "image", "classes": 10},
                },
                "mixture": {"motion": 4, "digits": 4},
                "workers": 0,
            },
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 2, "log_every": 1, "ema_decay": 0.5},
            "engine": {"precision": "fp32"},
            "evaluation": {"temporal_views": 2, "spatial_views": 1, "batch": 3},
        }
        return Recipe.model_validate({**values, **sections})

    return make
