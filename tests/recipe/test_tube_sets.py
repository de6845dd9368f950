"""Tubes that nothing in the mixture reads are found in the recipe, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import RecipeError
from framework.recipe import Recipe, load_recipe, recipe_names
from framework.recipe.tube_sets import check_tubes_are_read, unread_tubes

RECIPE = """\
name: joint
model: {name: tubevit_b}
data:
  sources:
    videos: {path: shards, kind: video, classes: 8, clip: {frames: 32, stride: 2}}
    images: {path: shards, kind: image, classes: 10}
  mixture: {videos: 8, images: 8}
optimizer: {lr: 1e-3}
train: {steps: 10}
"""
IMAGES = "data.mixture={images: 8}"
SCALE_UP = ("init={tubes: a, encoder: b}",)


def load(folder: Path, *overrides: str) -> Recipe:
    path = folder / "joint.yaml"
    path.write_text(RECIPE)
    return load_recipe(str(path), overrides).recipe


@pytest.mark.parametrize(
    ("overrides", "unread"),
    [
        ((), []),
        ((IMAGES,), [1, 2, 3]),
        ((IMAGES, "model.tube_set=one"), []),
        ((IMAGES, "model={name: vit_b}"), []),
        ((IMAGES, "model.kernels=interpolated", "model.interpolate_2d=true"), [1, 2, 3]),
        (("data.mixture={videos: 8}",), []),
        (("data.sources.videos.loss_weight=0",), [1, 2, 3]),
        ((IMAGES, "model.scale_up={tube_width: 768, frozen_layers: 4}", *SCALE_UP), []),
        (
            (IMAGES, "model.scale_up={tube_width: 768, frozen_layers: 0, train_tokenizer: true}", *SCALE_UP),
            [1, 2, 3],
        ),
    ],
)
def test_tubes_without_a_reader(tmp_path: Path, overrides: tuple[str, ...], unread: list[int]) -> None:
    found = unread_tubes(load(tmp_path, *overrides))
    assert [words.split(" (")[0] for words in found] == [f"tube {number} of 4" for number in unread]


def test_they_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_tubes_are_read(load(tmp_path, IMAGES))
    text = str(caught.value)
    assert "tube 2 of 4 (`model.tubes[1]`: kernel 16x4x4, stride 6x32x32" in text
    for words in ("Add a source of videos to data.mixture", "`model.tubes`", "vit_b", "`guards.dead: 0`"):
        assert words in text


def test_whoever_says_so_may(tmp_path: Path) -> None:
    recipe = load(tmp_path, IMAGES, "guards.dead=0")
    check_tubes_are_read(recipe)
    assert unread_tubes(recipe), "they are unread all the same"


@pytest.mark.parametrize("name", recipe_names())
def test_every_installed_recipe_reads_its_tubes(name: str) -> None:
    assert unread_tubes(load_recipe(name).recipe) == []
