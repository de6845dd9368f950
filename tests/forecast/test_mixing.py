"""Promises of the shuffle score in the summary of a plan: sorted shards are named, with what helps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from framework.data.manifest import DatasetInfo, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.data.sources import build_plan, open_sources
from framework.forecast.mixing import mixing_of, mixing_text
from framework.recipe.schema import Recipe

ROWS, SHARD, CLASSES = 4000, 1000, 40


def mixing(folder: Path, labels: np.ndarray, block: int, count: int) -> dict:
    """Of pictures with these labels, in four shards."""
    folder.mkdir()
    numbers = np.arange(ROWS)
    shards = []
    for number in range(ROWS // SHARD):
        name = f"shard-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            file.truncate(SHARD * 1024)
        shards.append(ShardInfo(name, SHARD * 1024, "0" * 32, SHARD))
    columns = {
        "key": [f"key-{number}" for number in numbers], "shard": numbers // SHARD,
        "offset": numbers % SHARD * 1024, "length": np.full(ROWS, 100), "crc32": numbers,
        "dataset": np.zeros(ROWS, np.uint16), "kind": np.zeros(ROWS, np.uint8), "label": labels,
        "width": np.full(ROWS, 64), "height": np.full(ROWS, 48), "frames": np.ones(ROWS, np.uint32),
        "fps": np.zeros(ROWS), "keyframes": [[]] * ROWS, "extension": ["jpg"] * ROWS,
    }  # fmt: skip
    classes = tuple(f"class {number}" for number in range(CLASSES))
    write_manifest(folder, columns, shards, [DatasetInfo("stills", "train", "image", classes, ROWS)])
    recipe = Recipe.model_validate(
        {
            "name": "mixing",
            "model": {"name": "tubevit_ti"},
            "data": {
                "sources": {"stills": {"path": str(folder), "kind": "image", "classes": CLASSES}},
                "mixture": {"stills": count},
                "block": block,
            },
            "optimizer": {"lr": 0.001},
            "train": {"steps": 10},
        }
    )
    sources = open_sources(recipe)
    return mixing_of(recipe, sources["stills"], build_plan(recipe, sources))


def test_sorted_shards_and_a_small_window_are_warned_of(tmp_path: Path) -> None:
    ordered = np.arange(ROWS) * CLASSES // ROWS
    found = mixing(tmp_path / "sorted", ordered, block=4, count=8)
    assert found["warning"]
    assert found["sorted"] > 0.9
    assert found["score"] < 0.5
    assert found["score"] == pytest.approx(found["worst"])
    assert found["block"] > 4
    text = "\n".join(mixing_text("stills", found, 4))
    assert "WARNING: the shards of stills are sorted by class" in text
    assert f"raise data.block from 4 to {found['block']};" in text
    assert not mixing(tmp_path / "longer", ordered, block=found["block"], count=8)["warning"]


def test_the_same_samples_shuffled_are_not(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(ROWS) * CLASSES // ROWS)
    found = mixing(tmp_path / "shuffled", labels, block=4, count=8)
    assert (found["warning"], found["block"]) == (False, None)
    assert found["sorted"] < 0.1
    assert found["score"] > 0.6 > found["worst"]
    (line,) = mixing_text("stills", found, 4)
    assert line.startswith(f"  shuffle stills: {found['score']:.2f} over 8 steps (1: classes as mixed")


def test_samples_of_one_class_have_the_worst_score_alone(tmp_path: Path) -> None:
    found = mixing(tmp_path / "none", np.full(ROWS, 0), block=4, count=8)
    assert (found["score"], found["sorted"], found["warning"]) == (None, None, False)
    assert "no labels to compare" in mixing_text("stills", found, 4)[0]
