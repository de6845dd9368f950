"""An FFCV file gives the batches of its shards; without ffcv the command says what to install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from framework.data.loader import evaluation_batches, training_batches
from framework.data.sources import build_plan, open_sources
from framework.errors import DataError, RecipeError
from framework.recipe import load_recipe
from framework.world import World

RECIPE = """
name: probe
model: {{name: tubevit_ti}}
data:
  sources: {{pets: {{path: {path}, validation: {path}, kind: image, classes: 2, size: 24{more}}}}}
  mixture: {{pets: 4}}
  workers: {workers}
optimizer: {{lr: 0.001}}
train: {{steps: 10}}
"""


@pytest.fixture
def shards(
    tubeworks: Callable[..., Any], class_folders: Callable[..., Path], make_image: Callable[..., bytes],
    tmp_path: Path,
) -> Path:  # fmt: skip
    files = {f"{'catdog'[i % 2 * 3 :][:3]}/{i}.jpg": make_image((40 + i, 50 - i), seed=i) for i in range(11)}
    root, other = class_folders(files, "pets"), class_folders({"elk/1.jpg": make_image()}, "others")
    inputs = ("--input", f"others=folder:input={other}", "--input", f"pets=folder:input={root}")
    assert tubeworks("shard", "mix", *inputs, "--shard-samples", 4, "--out", tmp_path / "shards").code == 0
    return tmp_path / "shards"


def batches(folder: Path, shards: Path, more: str, workers: int, world: World) -> list[Any]:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(path=shards, more=more, workers=workers))
    recipe = load_recipe(str(path), []).recipe
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    made = training_batches(recipe, sources, plan, world, start_step=1, stop_step=6)
    validation = open_sources(recipe, "validation")["pets"]
    held_out = evaluation_batches(validation, world, temporal_views=1, spatial_views=1, batch=4, workers=0)
    trained = [(b.groups["pets"].pixels, b.groups["pets"].labels, b.groups["pets"].seeds) for b in made]
    return trained + [(b.pixels, b.labels, b.index) for b in held_out]


def need_ffcv() -> None:
    reason = "ffcv is not installed, or does not load; what the command says then is tested below"
    pytest.importorskip("ffcv", reason=reason, exc_type=ImportError)


def both(file: Path) -> str:
    return f", beton: {file}, validation_beton: {file}"


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def test_a_raw_file_gives_the_same_batches_bit_for_bit(
    tubeworks: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    need_ffcv()
    file = tmp_path / "pets.beton"
    done = tubeworks("export-ffcv", shards, "--dataset", "pets", "--out", file, "--workers", 1, "--json")
    assert done.code == 0, done.stderr
    assert (done.json["samples"], done.json["mode"]) == (11, "raw")
    expected = batches(tmp_path, shards, "", 0, World(0, 1))
    more = both(file)
    assert same(batches(tmp_path, shards, more, 0, World(0, 1)), expected)
    assert same(batches(tmp_path, shards, more, 2, World(0, 1)), expected), "whatever the workers"
    for shard in shards.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert same(batches(tmp_path, shards, more, 0, World(0, 1)), expected), "the shards are not read"


def test_ffcvs_own_reader_reads_the_file_and_jpg_is_close(
    tubeworks: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    need_ffcv()
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    from framework.data.manifest import Manifest

    raw, jpg = tmp_path / "raw.beton", tmp_path / "small.beton"
    assert tubeworks("export-ffcv", shards, "--dataset", "pets", "--out", raw, "--workers", 1).code == 0
    assert (
        tubeworks(
            "export-ffcv", shards, "--dataset", "pets", "--out", jpg, "--workers", 1, "--mode", "jpg"
        ).code
        == 0
    )
    pipelines = {"image": [CenterCropRGBImageDecoder((24, 24), ratio=1)], "label": [IntDecoder()]}
    loader = Loader(
        str(raw),
        batch_size=11,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines=pipelines,
        os_cache=True,
    )
    [(images, labels)] = [(numpy.array(a), numpy.array(b)) for a, b in loader]
    manifest = Manifest.open(shards)
    expected = manifest.column("label")[manifest.select("pets", "pets", "image")]
    assert labels.ravel().tolist() == expected.tolist()
    assert images.shape == (11, 24, 24, 3)
    exact = batches(tmp_path, shards, both(raw), 0, World(0, 1))
    close = batches(tmp_path, shards, both(jpg), 0, World(0, 1))
    errors = [(a[0].float() - b[0].float()).abs().mean().item() for a, b in zip(exact, close, strict=True)]
    assert 0 < max(errors) < 12, "noise, encoded once more at quality 92"


def test_a_file_of_other_shards_is_refused(
    tubeworks: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    need_ffcv()
    file = tmp_path / "pets.beton"
    assert tubeworks("export-ffcv", shards, "--dataset", "pets", "--out", file, "--workers", 1).code == 0
    again = tubeworks("export-ffcv", shards, "--dataset", "pets", "--out", file, "--workers", 1)
    assert (again.code, "exists already" in again.stderr) == (3, True)
    with file.open("ab") as tail:
        tail.write(b"x")
    with pytest.raises(DataError, match="export it again"):
        batches(tmp_path, shards, both(file), 0, World(0, 1))
    with pytest.raises(DataError, match="make it with"):
        batches(tmp_path, shards, both(tmp_path / "none.beton"), 0, World(0, 1))


def test_a_source_of_videos_has_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(path="shards", more=", beton: pets.beton", workers=0))
    clip = ["data.sources.pets.kind=video", "data.sources.pets.clip={frames: 4, stride: 1}"]
    with pytest.raises(RecipeError, match="FFCV files hold no video"):
        load_recipe(str(path), clip)


def test_without_ffcv_the_command_says_what_to_install(
    tubeworks: Callable[..., Any], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    done = tubeworks("export-ffcv", shards, "--dataset", "pets", "--out", tmp_path / "pets.beton")
    assert done.code == 3
    assert "libopencv-dev" in done.stderr
    assert "tubeworks[ffcv]" in done.stderr
