"""Compiled blocks train as the others do, in one graph, and evaluation compiles nothing more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_processes import start_training, train_to_end

from framework.errors import RecipeError
from framework.recipe.schema import Recipe
from framework.tracking.journal import read_journal


@pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="needs a C++ compiler; test_tubevit compiles the same blocks without one",
)
def test_losses_are_those_of_the_plain_model(recipe_file: Path, shards: Path, tmp_path: Path) -> None:
    common = ("train.steps=4", "train.eval_every=2", "evaluation.temporal_views=2")
    held_out = f"data.sources.motion.validation={shards}/val"
    train_to_end(recipe_file, tmp_path / "plain", 1, *common, held_out)
    job = start_training(recipe_file, tmp_path / "compiled", 1, *common, held_out, "train.compile=true")
    assert job.wait(300) == [0], job.said()[-3000:]
    assert "recompile_limit" not in job.said()
    expected, found = (read_metrics(tmp_path / name) for name in ("plain", "compiled"))
    assert {"train/loss", "train/grad_norm", "eval/motion/loss"} <= expected.keys()
    for key, values in expected.items():
        if key.startswith("eval/") or key in ("train/loss", "train/grad_norm"):
            assert found[key] == pytest.approx(values, rel=1e-4), key


def read_metrics(run: Path) -> dict[str, dict[int, float]]:
    """The values of every metric by step."""
    metrics: dict[str, dict[int, float]] = {}
    for entry in read_journal(run):
        for key, value in entry.metrics.items():
            metrics.setdefault(key, {})[entry.step] = value
    return metrics


def test_zero_3_does_not_go_with_it(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"train.compile.*engine.zero: 3"):
        make_recipe("engine.zero=3", "train.compile=true")
