"""Trainings of video models that start from other runs: an image model, a masked autoencoder, other clips."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import Job, command_line, journalled, start_training, train_to_end

from framework.errors import RecipeError
from framework.exchange.evaluate import evaluate_run
from framework.exchange.exporting import export_run
from framework.models.registry import build_model, inputs_of
from framework.recipe import patches
from framework.recipe.schema import Recipe
from framework.training.checkpoint import load_weights, newest_valid
from framework.training.initial import find_origins, load_initial
from framework.world import World

Make = Callable[..., Recipe]
SMALL = "width: 32, depth: 2, heads: 4"
VIT = f"model={{name: vit_ti, {SMALL}, patch: 8, gelu: tanh}}"
MODEL_3 = f"model={{name: vivit_ti_m3, {SMALL}, tubelet: [2, 8, 8]}}"
MASKED = f"model={{name: videomae_ti, {SMALL}, tubelet: [2, 4, 4], pretrain: {{ratio: 0.75}}}}"
CLASSIFIER = f"model={{name: videomae_ti, {SMALL}, tubelet: [2, 4, 4]}}"
SHORT = ("train.steps=2", "train.ema_decay=null", "schedule.warmup=0", "checkpoint.every=2")
IMAGES = ("data.mixture={digits: 8}", "data.sources.motion.clip.frames=1", "data.sources.motion.size=24")
VIDEO = ("data.mixture={motion: 8}",)


@pytest.fixture(scope="module")
def image_run(recipe_file: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a ViT on the pictures."""
    digits = f"{{path: {shards}/train, kind: image, classes: 10, size: 16}}"
    settings = (VIT, f"data.sources={{digits: {digits}}}", "data.mixture={digits: 8}", *SHORT)
    return train_to_end(recipe_file, tmp_path_factory.mktemp("image") / "run", 1, *settings)


@pytest.fixture(scope="module")
def masked_run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a masked autoencoder on the clips."""
    folder = tmp_path_factory.mktemp("masked") / "run"
    held_out = "data.sources.motion.validation=" + str(shards_of(recipe_file) / "val")
    return train_to_end(recipe_file, folder, 1, MASKED, *VIDEO, *SHORT, held_out)


def shards_of(recipe_file: Path) -> Path:
    """The folder of shards that the tiny recipe reads."""
    (line,) = {line for line in recipe_file.read_text().splitlines() if "path: " in line}
    return Path(line.partition("path: ")[2]).parent


def train_undivided(*arguments: str) -> None:
    """`tubeworks train` as it was before clips that patches do not divide were refused."""
    patches.check_clips_are_divided = lambda recipe: None
    command_line("train", *arguments)


def test_a_run_of_clips_that_patches_do_not_divide_goes_on_but_none_begins(
    recipe_file: Path, shards: Path, tmp_path: Path
) -> None:
    digits = f"{{path: {shards}/train, validation: {shards}/val, kind: image, classes: 10, size: 18}}"
    settings = (VIT, f"data.sources={{digits: {digits}}}", "data.mixture={digits: 8}", *SHORT)
    run = tmp_path / "run"
    refused = start_training(recipe_file, run, 1, *settings)
    assert refused.wait() == [2]
    assert "digits.size is 18, which 8 pixels of height of vit_ti do not divide" in refused.said()
    assert not run.exists()
    old = Job(1, tmp_path, train_undivided, str(recipe_file), *settings, "--run", str(run))
    assert old.wait() == [0], old.said()[-3000:]
    assert train_to_end(recipe_file, run, 1, *settings) == run
    assert export_run(run, "safetensors", tmp_path / "out").files
    assert evaluate_run(run, World(0, 1, 0, 1))


def test_model_3_starts_from_an_image_run_and_trains(
    recipe_file: Path, image_run: Path, tmp_path: Path
) -> None:
    settings = (MODEL_3, f"init.image={{run: {image_run}}}", *SHORT)
    run = train_to_end(recipe_file, tmp_path / "run", 1, *settings)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "initialised"]
    assert event["from"] == {"image": str(newest_valid(image_run))}
    assert event["resized"]["tokenizer.tubes.0.weight"] == "image:tokenizer.tubes.0.weight (central frame)"
    assert event["resized"]["blocks.1.temporal_attn.proj.weight"] == "image:blocks.1.attn.proj.weight (zero)"
    assert event["resized"]["places.weight"] == "image:places.weight (repeated over time)"
    assert event["loaded"]["heads.digits.weight"] == "image:heads.digits.weight"
    assert {name.split(".")[0] for name in event["new"]} == {"heads", "blocks"}
    assert event["unused"] == ["image:places.class_token", "image:places.class_place"]
    weights = load_weights(newest_valid(run))
    assert set(weights) == {*event["loaded"], *event["resized"], *event["new"]}
    assert weights["blocks.0.temporal_attn.proj.weight"].abs().sum() > 0, "it has moved"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((MODEL_3, "model.depth=3"), "is of another model"),
        (("model.name=tubevit_ti",), "makes a vivit, timesformer or videomae out of a vit"),
        ((MODEL_3, "model.tubelet=[2, 4, 4]"), "same patches"),
    ],
)
def test_images_models_that_do_not_fit(
    make_recipe: Make, image_run: Path, overrides: tuple[str, ...], words: str
) -> None:
    recipe = make_recipe(*overrides, f"init.image={{run: {image_run}}}")
    assert recipe.init is not None
    model = build_model(recipe.model, inputs_of(recipe))
    with pytest.raises(RecipeError, match=words):
        load_initial(model, recipe, find_origins(recipe.init))


def test_zero_everywhere_is_said_to_be_useless(
    make_recipe: Make, image_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(MODEL_3, f"init.image={{run: {image_run}, zero: all}}")
    assert recipe.init is not None
    with caplog.at_level(logging.WARNING):
        load_initial(build_model(recipe.model, inputs_of(recipe)), recipe, find_origins(recipe.init))
    assert "it never learns" in caplog.text


def test_a_masked_autoencoder_trains_without_labels(masked_run: Path) -> None:
    metrics = journalled(masked_run)[2]
    assert 0 < metrics["train/motion/loss"] < 3
    assert not [name for name in metrics if "top" in name]
    assert not [name for name in load_weights(newest_valid(masked_run)) if name.startswith("heads.")]
    with pytest.raises(RecipeError, match="which has no classifier"):
        evaluate_run(masked_run, World(0, 1, 0, 1))


def test_the_encoder_of_a_masked_autoencoder_becomes_a_classifier(
    make_recipe: Make, masked_run: Path
) -> None:
    recipe = make_recipe(CLASSIFIER, f"init.weights={masked_run}", *VIDEO)
    assert recipe.init is not None
    model = build_model(recipe.model, inputs_of(recipe))
    account = load_initial(model, recipe, find_origins(recipe.init))
    weights = load_weights(newest_valid(masked_run))
    assert {name.split(".")[0] for name in account.new} == {"pool_norm", "heads"}
    assert {name.partition(":")[2].split(".")[0] for name in account.unused} == {"decoder", "norm"}
    assert torch.equal(model.state_dict()["blocks.1.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"])


def test_places_are_interpolated_for_other_clips(make_recipe: Make, image_run: Path) -> None:
    """The same model with frames of another size: everything is loaded, and the places are resized."""
    recipe = make_recipe(VIT, f"init.weights={image_run}", "data.sources.digits.size=24", *IMAGES)
    assert recipe.init is not None
    model = build_model(recipe.model, inputs_of(recipe))
    account = load_initial(model, recipe, find_origins(recipe.init))
    assert account.resized == {"places.weight": "weights:places.weight (interpolated)"}
    assert "resized places.weight from weights (interpolated)" in account.table()
    assert account.new == ["heads.motion.weight", "heads.motion.bias"]
    assert account.unused == []
