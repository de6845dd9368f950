"""The recipes of ViViT and of the systems it is compared with: what they build, feed and promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import recipes
from framework.models.describe import describe_recipe
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe

VIVIT = [f"vivit_{size}_m{kind}" for size in "bl" for kind in (1, 2, 3, 4)]
OTHERS = [
    "vit_b_in1k",
    "vit_l_in1k",
    "timesformer_b_k400",
    "mtv_b_k400",
    "videomae_b_k400_pretrain",
    "videomae_b_k400_finetune",
]
ALL = [*(f"{name}_{data}" for name in VIVIT for data in ("k400", "ssv2", "epic")), *OTHERS]


@pytest.mark.parametrize("name", ALL)
def test_recipes_build_and_state_what_was_published(name: str) -> None:
    recipe = load_recipe(name).recipe
    with torch.device("meta"):
        build_model(recipe.model, inputs_of(recipe))
    text = (Path(recipes.__path__[0]) / f"{name}.yaml").read_text(encoding="utf-8")
    head = text.partition("\nbase:")[0].partition("\nname:")[0]
    assert recipe.name == name
    assert re.search(r"Published \(arXiv \d{4}\.\d{5}", head)
    for value in recipe.published.values():
        assert re.search(r"\d\d\.\d", value).group() in head  # type: ignore[union-attr]


@pytest.mark.parametrize("name", VIVIT)
@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        ("k400", (0.1, 0.0, 0.0, 0.0, 2)),
        ("ssv2", (0.5, 0.3, 0.3, 0.3, 1)),
        ("epic", (0.5, 0.2, 0.2, 0.1, 1)),
    ],
)
def test_vivit_follows_table_7(name: str, data: str, numbers: tuple[float, ...]) -> None:
    recipe = load_recipe(f"{name}_{data}").recipe
    source = recipe.data.sources[data]
    assert source.clip is not None
    said = (
        recipe.optimizer.lr,
        recipe.model.stochastic_depth,
        source.label_smoothing,
        source.mixup,
        source.clip.stride,
    )
    assert said == numbers
    assert (recipe.optimizer.name, recipe.optimizer.momentum, recipe.optimizer.clip) == ("sgd", 0.9, 1.0)
    assert (recipe.schedule.name, recipe.schedule.warmup_epochs) == ("cosine", 2.5)
    assert recipe.data.mixture == {data: 64}
    assert source.augment.scale_jitter is not None
    assert source.augment.scale_jitter.scale == (0.9, 1.33)
    assert (source.augment.color_jitter is not None) == (data == "k400")
    assert (source.augment.randaugment is not None) == (data != "k400")
    assert recipe.init is not None
    assert recipe.model.name == name


@pytest.mark.parametrize("name", ["vivit_l_m2_ssv2", "vivit_b_m3_epic", "videomae_b_k400_finetune"])
def test_fine_tuning_starts_from_a_recipe_that_exists(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.init is not None
    assert recipe.init.weights is not None
    before = load_recipe(Path(recipe.init.weights).name).recipe
    assert before.model.name == recipe.model.name


def test_operations_of_the_recipes() -> None:
    assert describe_recipe(load_recipe("vivit_b_m2_k400").recipe)["cost"]["k400"][
        "hlo_half"
    ] == pytest.approx(284.4, rel=1e-3)
    epic = describe_recipe(load_recipe("vivit_b_m2_epic").recipe)
    assert epic["sources"]["epic"]["classes"] == 397
    assert describe_recipe(load_recipe("videomae_b_k400_pretrain").recipe)["tokens"] == {"k400": 1568}
