"""The recipes of scale-ups: what they build, what they start from, and what they estimate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import recipes
from framework.models.describe import describe_recipe
from framework.models.registry import build_model, inputs_of, size_of
from framework.models.scaleup import image_tube
from framework.recipe import Recipe, load_recipe
from framework.recipe.tube_sets import tubes_of

SCALE_UPS = {
    "scaleup_demo": ("demo", "scaleup_demo_images"),
    "tubevit_h_scaleup_k400": ("tubevit_b_k400_in1k", "tubevit_h_in1k"),
    "tubevit_h_scaleup_k600": ("tubevit_b_k600_in1k", "tubevit_h_in1k"),
}
LARGE = [name for name in SCALE_UPS if name != "scaleup_demo"]
SUSTAINED = 0.4 * 989e12  # operations a second that the estimates assume


def header(name: str) -> str:
    """The text of a recipe's file."""
    return (Path(recipes.__path__[0]) / f"{name}.yaml").read_text(encoding="utf-8")


def operations(recipe: Recipe) -> float:
    """Of one forward pass of a step."""
    costs = describe_recipe(recipe)["cost"]
    return 1e9 * sum(count * costs[source]["flop"] for source, count in recipe.data.mixture.items())


@pytest.mark.parametrize("name", SCALE_UPS)
def test_the_steps_before_make_what_the_scale_up_takes(name: str) -> None:
    recipe = load_recipe(name).recipe
    small, images = (load_recipe(before).recipe for before in SCALE_UPS[name])
    assert recipe.model.scale_up is not None
    assert recipe.init is not None
    assert recipe.model.scale_up.tube_width == size_of(small.model).width
    assert size_of(recipe.model) == size_of(images.model)
    assert tubes_of(recipe.model) == tubes_of(small.model)
    flat = image_tube(tubes_of(recipe.model))
    assert flat is not None
    assert tubes_of(images.model) == (tubes_of(recipe.model)[flat],), "no tubes that images would not train"
    assert {recipe.data.sources[source].kind for source in recipe.data.mixture} == {"video"}
    for before, run in zip(SCALE_UPS[name], (recipe.init.tubes, recipe.init.encoder), strict=True):
        assert re.search(rf"tubeworks train {before} .*--run {run}\b", header(name))


@pytest.mark.parametrize("name", LARGE)
def test_h_has_the_published_size_and_trains_its_last_quarter(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert describe_recipe(recipe)["parameters"] / 1e6 == pytest.approx(635, abs=0.5)
    with torch.device("meta"):
        model = build_model(recipe.model, inputs_of(recipe))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == way) for way in (True, False)]
    assert counts[0] / sum(counts) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", LARGE)
def test_headers_state_results_and_hours(name: str) -> None:
    recipe, text = load_recipe(name).recipe, header(name)
    assert recipe.model.scale_up is not None
    for value in recipe.published.values():
        assert value[:4] in text
    trained = 1 - recipe.model.scale_up.frozen_layers / size_of(recipe.model).depth
    hours = recipe.train.steps * operations(recipe) / SUSTAINED / 3600
    stated = re.search(r"Estimated: (\d+) GPU-hours .* fine-tuning everything takes (\d+)", text)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(hours * (1 + 2 * trained), abs=0.6)
    assert float(stated[2]) == pytest.approx(hours * 3, abs=0.6)


def test_the_image_model_states_its_hours() -> None:
    recipe = load_recipe("tubevit_h_in1k").recipe
    stated = re.search(r"Estimated: (\d+) GPU-hours", header("tubevit_h_in1k"))
    assert stated is not None
    hours = 3 * recipe.train.steps * operations(recipe) / SUSTAINED / 3600
    assert float(stated[1]) == pytest.approx(hours, abs=0.6)
