"""Promises of looking at shards: a page of its own, the pictures of a step, a plan in numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

Command = Callable[..., Any]

RECIPE = """\
name: looked-at
model: {{name: tubevit_ti}}
data:
  sources:
    digits: {{path: {path}, kind: image, classes: 10, size: 32}}
    motion: {{path: {path}, kind: video, classes: 8, size: 32, clip: {{frames: 32, stride: 1}}}}
  mixture: {{digits: 4, motion: 2}}
  workers: 0
optimizer: {{lr: 1e-3}}
train: {{steps: 30}}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_tools.synth import SynthOptions, synthesize

    folder = tmp_path_factory.mktemp("looking") / "synth"
    synthesize(SynthOptions(folder, 32, 16, 6, 2, 8, 2, 0, 1, False))
    return folder / "train"


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "looked-at.yaml"
    path.write_text(RECIPE.format(path=shards), encoding="utf-8")
    return path


def test_the_page_shows_every_data_set_and_needs_nothing_else(
    shards: Path, tmp_path: Path, tubeworks: Command
) -> None:
    output = tubeworks("inspect", shards, "--html", tmp_path / "page.html")
    assert output.code == 0, output.stderr
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == 14  # all 6 videos and 8 images
    assert all(f"<h2>{name}</h2>" in text for name in ("digits", "motion"))
    assert {"duration, s", "size, kB", "rate, frames/s"} <= set(re.findall('aria-label="([^"]*)"', text))
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?://|<script""", text)


def test_a_browser_shows_the_page(shards: Path, tmp_path: Path, tubeworks: Command) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here; the page's content is tested beside this")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    tubeworks("inspect", shards, "--html", page)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,1400"]
    subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    pixels = numpy.asarray(Image.open(picture).convert("RGB"))
    blue = (pixels == (0x3B, 0x6E, 0xA8)).all(axis=2)  # bars of the histograms
    assert blue.sum() > 500
    assert (pixels == 255).all(axis=2).mean() < 0.98


def test_a_sample_that_does_not_decode_is_shown_with_its_reason(
    shards: Path, tmp_path: Path, tubeworks: Command
) -> None:
    from framework.data.manifest import Manifest

    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    sample = Manifest.open(folder).sample(0)
    with (folder / sample.shard).open("r+b") as file:
        file.seek(sample.offset)
        file.write(b"damaged")
    tubeworks("inspect", folder, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == 13
    assert "checksum of the bytes is" in text


@pytest.mark.parametrize("form", ["png", "html"])
def test_the_pictures_of_a_step_are_those_of_training(
    form: str, recipe: Path, tmp_path: Path, tubeworks: Command
) -> None:
    first, again = tmp_path / f"a.{form}", tmp_path / f"b.{form}"
    output = tubeworks("inspect", recipe, "--step", 3, "--out", first, "--json")
    assert output.json["samples"] == 6
    tubeworks("inspect", recipe, "data.workers=1", "--step", 3, "--out", again)
    assert first.read_bytes() == again.read_bytes()
    tubeworks("inspect", recipe, "--step", 4, "--out", again)
    assert first.read_bytes() != again.read_bytes()
    part = tubeworks("inspect", recipe, "--step", 3, "--out", again, "--world", 2, "--rank", 1, "--json")
    assert part.json["samples"] == 3


def test_a_step_that_is_never_trained_has_no_pictures(
    recipe: Path, tmp_path: Path, tubeworks: Command
) -> None:
    output = tubeworks("inspect", recipe, "--step", 30, "--out", tmp_path / "step.png")
    assert (output.code, "step 30 is not in 0 … 29" in output.stderr) == (2, True)
    assert not (tmp_path / "step.png").exists()


def test_small_pictures_stand_side_by_side() -> None:
    from data_tools.page import grid_of

    colours = [(place, 255 - place, 7) for place in range(40)]
    strips = [
        (f"sample {place}: a class", Image.new("RGB", (112, 112), c)) for place, c in enumerate(colours)
    ]
    strips.insert(
        20, ("a video with a name " + "that is long " * 60, Image.new("RGB", (900, 112), (1, 2, 3)))
    )
    sheet = numpy.asarray(grid_of(strips))
    assert sheet.shape[1] <= 1320
    assert sheet.shape[0] <= 6 * 128
    for colour in [*colours, (1, 2, 3)]:  # whole and uncovered
        assert (sheet == colour).all(axis=2).sum() == (900 if colour == (1, 2, 3) else 112) * 112


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "SHARDS", "--world", 2, "--out", "x.png"), "--out, --world: needs --step"),
        (("inspect", "SHARDS", "data.workers=1"), "KEY=VALUE: needs --step"),
        (("inspect", "RECIPE", "--step", 0, "--out", "x.png", "--html", "x.html"), "--out: --html names"),
        (("plan", "RECIPE", "--nodes", 2), "--nodes: needs --summary"),
        (("plan", "RECIPE", "--measure", 0), "--measure: needs --summary"),
        (("plan", "RECIPE", "--summary", "--rank", 0), "--rank: does not go with --summary"),
    ],
)
def test_options_that_would_be_ignored_are_errors(
    recipe: Path, shards: Path, tubeworks: Command, arguments: tuple[Any, ...], words: str
) -> None:
    places = {"SHARDS": shards, "RECIPE": recipe}
    done = tubeworks(*(places.get(one, one) for one in arguments))
    assert done.code == 2
    assert words in " ".join(re.sub("[^ -~]", " ", done.stderr).split())


def test_the_summary_of_a_plan(recipe: Path, tubeworks: Command) -> None:
    content = tubeworks("plan", recipe, "--summary", "--gpus-per-node", 2, "--measure", 2, "--json").json
    assert content["sources"]["digits"]["steps_per_epoch"] == 2.0
    assert content["sources"]["motion"]["epochs"] == 10.0
    assert content["decode_measured"] == ["digits", "motion"]
    assert min(content["decode_ms"].values()) > 0
    assert content["cores_per_gpu"] > 0
    assert content["gpu_hours"] > 0
    assert (content["cache"], content["egress"]) == (None, None)
    text = tubeworks("plan", recipe, "--summary", "--gpus-per-node", 2, "--measure", 0).stdout
    assert "2 a step, 3.0 steps an epoch, 10.00 epochs" in text
    assert "at 40% of its rate (assumed)" in text
    for source in ("digits", "motion"):
        assert 0 < content["sources"][source]["shuffle"]["score"] <= 1
        assert f"  shuffle {source}: " in text
