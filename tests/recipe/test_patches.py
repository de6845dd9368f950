"""Clips that patches do not divide are refused where something new begins, before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import RecipeError
from framework.models.describe import describe
from framework.recipe import Recipe, load_recipe, recipe_names
from framework.recipe.patches import check_clips_are_divided

RECIPE = """\
name: clips
model: {{name: {name}}}
data:
  sources: {{odd: {{path: shards, kind: {kind}, classes: 8, size: {size}{clip}}}}}
  mixture: {{odd: 8}}
optimizer: {{lr: 1e-3}}
train: {{steps: 10}}
"""


def load(folder: Path, name: str, frames: int, size: int) -> Recipe:
    kind, clip = ("video", f", clip: {{frames: {frames}, stride: 2}}") if frames > 1 else ("image", "")
    path = folder / "clips.yaml"
    path.write_text(RECIPE.format(name=name, kind=kind, size=size, clip=clip))
    return load_recipe(str(path)).recipe


@pytest.mark.parametrize(
    ("name", "clip", "words"),
    [
        ("vit_ti", (1, 100), "size is 100, which 16 pixels of height of vit_ti do not.*last 4 .*96 or 112"),
        ("vivit_ti_m1", (8, 33), "size is 33, .*32 or 48"),
        ("vivit_ti_m2", (7, 32), r"clip\.frames is 7, which 2 frames of vivit_ti_m2 do not divide.*6 or 8"),
        ("timesformer_ti_divided", (8, 40), "size is 40, .*32 or 48"),
        ("videomae_ti", (5, 32), r"clip\.frames is 5, .*4 or 6"),
        ("mtv_b", (12, 32), r"clip\.frames is 12, which 8 frames of mtv_b do not divide.*8 or 16"),
    ],
)
def test_what_would_be_cut_off_in_silence_is_refused(
    tmp_path: Path, name: str, clip: tuple[int, int], words: str
) -> None:
    recipe = load(tmp_path, name, *clip)
    with pytest.raises(RecipeError, match=rf"data\.sources\.odd\.{words}"):
        check_clips_are_divided(recipe)
    with pytest.raises(RecipeError, match=words):
        describe(str(tmp_path / "clips.yaml"))


@pytest.mark.parametrize("name", recipe_names())
def test_the_clips_of_every_installed_recipe_are_divided(name: str) -> None:
    check_clips_are_divided(load_recipe(name).recipe)
