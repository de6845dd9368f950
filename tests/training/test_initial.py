"""A run that starts from the weights of another one: what is taken, what is new, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import journalled, train_to_end
from torch import nn

from framework.errors import CheckpointError, RecipeError
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.training.checkpoint import load_weights, newest_valid
from framework.training.initial import Account, find_origins, load_initial

Make = Callable[..., Recipe]


def start(recipe: Recipe) -> tuple[nn.Module, Account]:
    """A model of the recipe with its initial weights."""
    assert recipe.init is not None
    model = build_model(recipe.model, inputs_of(recipe))
    return model, load_initial(model, recipe, find_origins(recipe.init))


@pytest.mark.parametrize("average", [False, True])
def test_every_tensor_of_the_same_model_is_loaded(make_recipe: Make, trained: Path, average: bool) -> None:
    model, account = start(make_recipe(f"init.weights={trained}", f"init.ema={str(average).lower()}"))
    expected = load_weights(newest_valid(trained), ema=average)
    assert set(account.loaded) == set(expected) == set(model.state_dict())
    assert account.new == account.unused == []
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_classifiers_of_other_classes_are_new(make_recipe: Make, trained: Path) -> None:
    recipe = make_recipe(f"init.weights={newest_valid(trained)}", "data.sources.digits.classes=7")
    _, account = start(recipe)
    assert account.new == ["heads.digits.weight", "heads.digits.bias"]
    assert sorted(account.unused) == ["weights:heads.digits.bias", "weights:heads.digits.weight"]
    table = account.table()
    assert "loaded  blocks.*.attn.qkv.weight from weights x 2" in table
    assert "new     heads.digits.weight" in table


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.depth=3", "is of another model"),
        ("model.heads=4", "is of another model"),
        ("model.pool=map", "pool.query has the shape"),
        ("model.pool=mean", "pool.query, pool.value.weight, pool.value.bias are there, but not in"),
        ("model.pool=class_token", "are there, but not in this recipe's model; only classifiers"),
        ("model.position=learned", "are in this recipe's model, but not there; only classifiers may be new"),
        ("model.tubes=[{kernel: [1, 4, 4], stride: [4, 8, 8]}]", "tokenizer.tubes.0.weight has the shape"),
    ],
)
def test_another_model_is_refused_in_one_line(
    make_recipe: Make, trained: Path, override: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        start(make_recipe(f"init.weights={trained}", override))
    assert words in str(caught.value)
    assert "init.weights" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_shapes_do_not_show_is_said(
    make_recipe: Make, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(make_recipe(f"init.weights={trained}", "model.position=fixed_no_stride"))
    assert "other values of model.position" in caplog.text


def test_folders_that_are_no_runs(make_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither a run .* nor a checkpoint"):
        start(make_recipe(f"init.weights={tmp_path}"))
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        start(make_recipe(f"init.weights={tmp_path}"))


def test_averages_that_were_not_kept(make_recipe: Make, recipe_file: Path, tmp_path: Path) -> None:
    settings = ("train.ema_decay=null", "train.steps=1", "schedule.warmup=0")
    run = train_to_end(recipe_file, tmp_path / "run", 1, *settings)
    with pytest.raises(CheckpointError, match=r"no moving average.*init.ema: false"):
        start(make_recipe(f"init.weights={run}", "init.ema=true"))


def test_a_training_starts_from_another_run_and_goes_on_from_itself(
    recipe_file: Path, trained: Path, tmp_path: Path
) -> None:
    settings = (f"init.weights={trained}", "train.log_every=1")
    run = train_to_end(recipe_file, tmp_path / "run", 1, *settings)
    assert journalled(run)[1]["train/loss"] != journalled(trained)[1]["train/loss"]
    whole = journalled(run)
    newest_valid(run).rename(tmp_path / "away")
    train_to_end(recipe_file, run, 1, *settings)
    assert journalled(run) == whole, "the second attempt begins with the run's own checkpoint"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "initialised"]
    assert event["from"] == {"weights": str(newest_valid(trained))}
    assert event["new"] == event["unused"] == []
    assert load_recipe(str(run / "recipe.yaml")).recipe.init is not None


def test_an_empty_section_says_what_is_missing(make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match=r"init.*needs `weights`"):
        make_recipe("init.ema=true")
