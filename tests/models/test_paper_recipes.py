"""The recipes of the paper's runs: what they build, what they feed, and what they estimate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import recipes
from framework.models.describe import describe_recipe
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.targets import TargetSpec

JOINT = [(size, classes) for size in "bl" for classes in (400, 600, 700)]
PAPER = [
    *(f"tubevit_{size}_k{classes}_in1k" for size, classes in JOINT),
    "tubevit_h_k400_in1k",
    "tubevit_b_ssv2",
    "tubevit_l_charades",
]
SUSTAINED = 0.4 * 989e12  # operations a second that the estimates assume


@pytest.mark.parametrize(("size", "classes"), JOINT)
def test_joint_recipes_follow_table_10(size: str, classes: int) -> None:
    recipe = load_recipe(f"tubevit_{size}_k{classes}_in1k").recipe
    inputs = inputs_of(recipe)
    assert recipe.model.name == f"tubevit_{size}"
    assert (inputs[f"k{classes}"].classes, inputs[f"k{classes}"].frames) == (classes, 64)
    assert inputs["in1k"].classes == 1000
    assert recipe.data.mixture == {f"k{classes}": 256, "in1k": 256}
    assert (recipe.train.steps, recipe.schedule.warmup) == (300_000, 10_000)
    assert recipe.optimizer.lr == (5e-5 if size == "b" else 1e-5)
    assert recipe.optimizer.weight_decay == (1e-3 if size == "b" else 1e-5)
    assert describe_recipe(recipe)["tokens"] == {f"k{classes}": 1176, "in1k": 196}


def test_something_something_is_not_mirrored() -> None:
    recipe = load_recipe("tubevit_b_ssv2").recipe
    source = recipe.data.sources["ssv2"]
    assert source.augment.flip == 0
    assert source.clip is not None
    assert (source.clip.frames, source.clip.fps) == (32, 24)
    assert (source.mixup, recipe.model.dropout, source.label_smoothing) == (0.3, 0.3, 0.3)
    assert recipe.optimizer.lr == 2e-5
    assert describe_recipe(recipe)["tokens"] == {"ssv2": 539}


def test_charades_follows_table_10_and_starts_from_what_its_header_says() -> None:
    recipe = load_recipe("tubevit_l_charades").recipe
    source = recipe.data.sources["charades"]
    assert source.targets == TargetSpec.multi(157)
    assert source.clip is not None
    assert (source.clip.frames, source.clip.fps) == (128, 6)
    assert (source.label_smoothing, recipe.model.dropout, source.mixup) == (0.1, 0.2, 0)
    assert (recipe.data.mixture, recipe.optimizer.lr) == ({"charades": 64}, 1e-3)
    assert describe_recipe(recipe)["tokens"] == {"charades": 2248}
    # the command of step 1, as it stands in the header
    text = (Path(recipes.__path__[0]) / "tubevit_l_charades.yaml").read_text(encoding="utf-8")
    words = re.search(r"tubeworks train (tubevit_l_k600_in1k) (\S+) (\S+) ", text)
    assert words is not None
    before = load_recipe(words.group(1), words.groups()[1:]).recipe
    with torch.device("meta"):
        states = [build_model(r.model, inputs_of(r)).state_dict() for r in (before, recipe)]
    one, two = ({k: v.shape for k, v in s.items() if not k.startswith("heads.")} for s in states)
    assert one == two


@pytest.mark.parametrize("name", PAPER)
def test_headers_state_the_result_and_the_hours(name: str) -> None:
    recipe = load_recipe(name).recipe
    text = (Path(recipes.__path__[0]) / f"{name}.yaml").read_text(encoding="utf-8")
    assert recipe.published
    for value in recipe.published.values():
        assert re.search(r"\d\d\.\d", value).group() in text  # type: ignore[union-attr]
    costs = describe_recipe(recipe)["cost"]
    # the backward pass costs twice the forward pass
    operations = 3 * 1e9 * sum(count * costs[source]["flop"] for source, count in recipe.data.mixture.items())
    hours = recipe.train.steps * operations / SUSTAINED / 3600
    stated = re.search(r"Estimated: (\d+) GPU-hours", text)
    assert stated is not None
    assert float(stated.group(1)) == pytest.approx(hours, abs=0.6)
