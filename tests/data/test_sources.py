"""Promises about opening sources: what does not fit the recipe is told before anything is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from framework.data.listing import listing
from framework.data.manifest import SAMPLES_NAME, Manifest
from framework.data.sources import build_plan, open_sources
from framework.errors import DataError, RecipeError

CLASSES = {"moves": ["left", "right", "up"], "stills": ["a", "b", "c", "d"]}


def test_sources_of_mixed_shards_are_found_by_name(shards: Path, make_recipe: Callable) -> None:
    sources = open_sources(make_recipe(shards))
    assert {name: len(opened) for name, opened in sources.items()} == {"moves": 10, "stills": 14}
    for name, opened in sources.items():
        everything = opened.keys(np.arange(len(opened)))
        assert everything == [f"{name}/{number:03d}" for number in range(len(opened))]


def test_only_sources_of_the_mixture_and_with_held_out_shards(shards: Path, make_recipe: Callable) -> None:
    recipe = make_recipe(shards, mixture={"moves": 4})
    assert list(open_sources(recipe)) == ["moves"]
    assert open_sources(recipe, "validation") == {}
    recipe = make_recipe(shards, video={"validation": str(shards)})
    assert list(open_sources(recipe, "validation")) == ["moves"]


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path, make_recipe: Callable) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar"):
        open_sources(make_recipe(folder))


def test_a_flipped_byte_among_the_labels(shards: Path, tmp_path: Path, make_recipe: Callable) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    labels = Manifest.open(folder).column("label").astype("<i4").tobytes()
    table = bytearray((folder / SAMPLES_NAME).read_bytes())
    table[table.index(labels)] ^= 1
    (folder / SAMPLES_NAME).write_bytes(table)
    with pytest.raises(DataError, match=r"samples\.arrow: its checksum is not that of manifest\.json"):
        open_sources(make_recipe(folder))


def test_classes_that_differ(shards: Path, make_recipe: Callable) -> None:
    with pytest.raises(
        DataError, match=r"has 3 classes, the recipe says 8 classes: set data\.sources\.moves\.classes=3"
    ):
        open_sources(make_recipe(shards, video={"classes": 8}))


def test_another_kind_of_media(shards: Path, make_recipe: Callable) -> None:
    with pytest.raises(DataError, match="holds images"):
        open_sources(make_recipe(shards, video={"dataset": "stills", "classes": 4}))


def test_held_out_classes_in_another_order(
    shards: Path, media: list, tmp_path: Path, helpers: ModuleType, make_recipe: Callable
) -> None:
    other = helpers.write_shards(tmp_path / "other", media, {**CLASSES, "moves": ["right", "left", "up"]}, 5)
    with pytest.raises(DataError, match="label 0 is 'right', but 'left' in the training shards"):
        open_sources(make_recipe(shards, video={"validation": str(other)}), "validation")


def test_a_rate_that_nobody_knows(tmp_path: Path, helpers: ModuleType, make_recipe: Callable) -> None:
    medium = helpers.video_medium(
        "moves/0", "moves", 0, helpers.encode_video(helpers.moving_frames(8, 32, 32))
    )
    medium.fps = 0.0
    folder = helpers.write_shards(tmp_path / "shards", [medium], {"moves": CLASSES["moves"]}, 1)
    clip = {"clip": {"frames": 4, "fps": 5}}
    with pytest.raises(DataError, match=r"no rate .* of 1 sample, moves/0 for one: .* instead of clip\.fps"):
        open_sources(make_recipe(folder, mixture={"moves": 1}, video=clip))
    open_sources(make_recipe(folder, mixture={"moves": 1}))


def test_labels_outside_the_classes(tmp_path: Path, helpers: ModuleType, make_recipe: Callable) -> None:
    medium = helpers.image_medium("stills/0", "stills", 4, helpers.moving_frames(1, 32, 32)[0])
    try:
        folder = helpers.write_shards(tmp_path / "shards", [medium], {"stills": CLASSES["stills"]}, 1)
    except DataError:
        return  # the writer refuses it already
    with pytest.raises(DataError, match="labels from 4 to 4, but 4 classes"):
        open_sources(make_recipe(folder, mixture={"stills": 1}))


def test_the_plan_does_not_depend_on_where_the_shards_lie(
    shards: Path, tmp_path: Path, make_recipe: Callable
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    one, other = (make_recipe(folder) for folder in (shards, copy))
    assert build_plan(one, open_sources(one)).hash == build_plan(other, open_sources(other)).hash


def test_listing_names_the_samples_of_a_rank(shards: Path, make_recipe: Callable) -> None:
    recipe = make_recipe(shards, train={"accumulation": 2})
    whole = listing(recipe, 3, 1, 0)
    parts = [listing(recipe, 3, 2, rank) for rank in range(2)]
    assert whole["plan"] == parts[0]["plan"] == parts[1]["plan"]
    assert whole["steps_per_epoch"] == {"moves": 2.5, "stills": 1.75}
    for name, count in recipe.data.mixture.items():
        keys = [[entry["key"] for micro in part["micro_batches"] for entry in micro[name]] for part in parts]
        assert keys[0] + keys[1] == [
            entry["key"] for micro in whole["micro_batches"] for entry in micro[name]
        ]
        assert len(keys[0]) == count // 2
        assert all(key.startswith(name + "/") for key in keys[0])
    with pytest.raises(RecipeError, match="numbers of ranks work: 1, 2"):
        listing(recipe, 3, 3, 0)
    with pytest.raises(RecipeError, match="rank 2"):
        listing(recipe, 3, 2, 2)
    with pytest.raises(RecipeError, match="step -1"):
        listing(recipe, -1, 2, 0)
    with pytest.raises(
        RecipeError, match=rf"step {recipe.train.steps} is not in 0 … {recipe.train.steps - 1}"
    ):
        listing(recipe, recipe.train.steps, 2, 0)
