"""A multi-label data set and one with two heads are learned, from files to metrics, on two ranks."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rank_processes import train_to_end

from data_tools.items import Collection, Entry, inventory
from data_tools.readers import FileReader
from data_tools.sharding import ShardOptions, shard
from framework.data.datasets import HeadInfo
from framework.data.loader import training_batches
from framework.data.manifest import Manifest
from framework.data.sources import build_plan, open_sources
from framework.errors import DataError, RecipeError, TrainingStopped
from framework.exchange.evaluate import evaluate_run
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.targets import TargetSpec
from framework.training.guards import CollapseGuard
from framework.training.losses import Mixing, binary_cross_entropy, source_loss
from framework.world import World

PLACES, COLOURS = ("nw", "ne", "sw", "se"), ("red", "green", "blue")
HEADS = (HeadInfo("place", PLACES), HeadInfo("colour", COLOURS))
RECIPE = """\
name: labels
model:
  {{name: tubevit_ti, width: 64, depth: 1, heads: 2, mlp_width: 128,
    tubes: [{{kernel: [1, 8, 8], stride: [1, 8, 8]}}]}}
data:
  sources:
    lights:
      path: {shards}/train
      validation: {shards}/val
      kind: image
      classes: 5
      target: multi
      size: 16
      augment: {{flip: 0, crop_area: [1, 1], crop_ratio: [1, 1]}}
    spots:
      path: {shards}/train
      validation: {shards}/val
      kind: image
      heads: {{place: 4, colour: 3}}
      size: 16
      augment: {{flip: 0, crop_area: [1, 1], crop_ratio: [1, 1]}}
  mixture: {{lights: 16, spots: 16}}
  workers: 0
optimizer: {{lr: 5e-3}}
train: {{steps: 180, log_every: 60}}
schedule: {{warmup: 5}}
engine: {{zero: 1, precision: fp32, bucket_mb: 1}}
evaluation: {{temporal_views: 1, spatial_views: 1, batch: 8}}
tracking: {{mlflow: false}}
"""


def draw(path: Path, colours: Sequence[int | None], seed: int) -> FileReader:
    """16 x 16 pixels: for each quadrant a colour, black where it is dark; with noise."""
    pixels = np.random.default_rng(seed).integers(0, 40, (16, 16, 3), dtype=np.uint8)
    for place, colour in enumerate(colours):
        if colour is not None:
            top, left = 8 * (place // 2), 8 * (place % 2)
            pixels[top : top + 8, left : left + 8, colour] += 200
    Image.fromarray(pixels).save(path)
    return FileReader.of(path)


def collections(folder: Path, split: str, count: int, seed: int) -> list[Collection]:
    """`lights`: which quadrants are lit, and a class that never applies; `spots`: where, and how."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lights, spots = [], []
    for number in range(count):
        lit = rng.random(4) < 0.4
        picture = draw(folder / f"l{number}.png", [0 if on else None for on in lit], seed + number)
        names = tuple(name for name, on in zip(PLACES, lit, strict=True) if on)
        lights.append(Entry(f"l{number}.png", f"{number:04d}", None, picture, names[::-1]))
        place, colour = int(rng.integers(4)), int(rng.integers(3))
        picture = draw(
            folder / f"s{number}.png", [colour if p == place else None for p in range(4)], seed + number
        )
        spots.append(
            Entry(f"s{number}.png", f"{number:04d}", None, picture, (PLACES[place], COLOURS[colour]))
        )
    return [
        Collection("lights", split, "image", (*PLACES, "moon"), lights, target="multi"),
        Collection("spots", split, "image", (), spots, target="heads", heads=HEADS),
    ]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    for split, count, seed in (("train", 128, 0), ("val", 37, 10_000)):
        files = collections(folder / f"{split}-files", split, count, seed)
        shard(inventory(files), ShardOptions(folder / split, samples=100))
    return folder


@pytest.fixture(scope="module")
def recipe_path(labelled: Path) -> Path:
    path = labelled / "labels.yaml"
    path.write_text(RECIPE.format(shards=labelled))
    return path


def test_shards_say_all_labels(labelled: Path) -> None:
    manifest = Manifest.open(labelled / "train")
    lights, spots = manifest.dataset("lights"), manifest.dataset("spots")
    assert (lights.target, lights.classes) == ("multi", (*PLACES, "moon"))
    assert spots.targets == TargetSpec.of_heads({"place": 4, "colour": 3})
    shard_file = {sample.shard for sample in map(manifest.sample, range(len(manifest)))}.pop()
    with tarfile.open(labelled / "train" / shard_file) as tar:
        names = {member.name for member in tar}
        for index in np.flatnonzero(manifest.column("shard") == int(shard_file[6:12]))[:20].tolist():
            sample = manifest.sample(index)
            member = tar.extractfile(f"{sample.key}.json")
            assert member is not None
            told = json.loads(member.read())
            assert told["targets"] == list(sample.targets)
            if sample.dataset == "lights":
                assert [
                    PLACES.index(name) for name in sorted(told["target_names"], key=PLACES.index)
                ] == list(sample.targets)
            else:
                place, colour = sample.targets
                assert told["target_names"] == {"place": PLACES[place], "colour": COLOURS[colour]}
            assert f"{sample.key}.cls" in names
            assert sample.label == -1


def test_batches_carry_what_the_pixels_show(recipe_path: Path) -> None:
    recipe = load_recipe(str(recipe_path)).recipe
    sources = open_sources(recipe)
    batches = training_batches(
        recipe, sources, build_plan(recipe, sources), World(), start_step=0, stop_step=3
    )
    for batch in batches:
        lights, spots = batch.groups["lights"], batch.groups["spots"]
        quadrants = lights.pixels.float().view(16, 3, 2, 8, 2, 8).mean(dim=(3, 5))  # (batch, 3, 2, 2)
        assert lights.labels.dtype == torch.float32
        assert torch.equal(lights.labels[:, :4], (quadrants[:, 0] > 100).flatten(1).float())
        assert not lights.labels[:, 4].any()
        bright = spots.pixels.float().view(16, 3, 2, 8, 2, 8).mean(dim=(3, 5)).flatten(1).argmax(dim=1)
        assert torch.equal(spots.labels, torch.stack([bright % 4, bright // 4], dim=1))


@pytest.fixture(scope="module")
def run(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_to_end(recipe_path, tmp_path_factory.mktemp("run") / "run", 2)


def test_both_are_learned(run: Path) -> None:
    report = evaluate_run(run, World())
    lights, spots = report.sources["lights"].metrics(), report.sources["spots"].metrics()
    assert lights["map"] > 0.9
    assert lights["map_max"] == pytest.approx(lights["map"])  # an image has one view
    assert lights["classes_without_positives"] == 1
    assert min(spots["place_top_1"], spots["colour_top_1"], spots["top_1"]) > 0.9
    assert spots["top_5"] >= spots["top_1"]
    assert report.as_dict()["sources"]["lights"]["average_precision"][4] is None
    for name in ("lights", "spots"):
        assert (run / "pictures" / f"predictions-{name}.png").is_file()
        assert (run / "pictures" / f"training-{name}.png").is_file()


def test_the_journal_has_them_by_name(run: Path) -> None:
    lines = [json.loads(line)["metrics"] for line in (run / "journal.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "train/loss" in line)
    last = next(line for line in reversed(lines) if "train/loss" in line)
    for key in ("train/lights/hit_1", "train/spots/top_1", "train/spots/place_top_1"):
        assert first[key] <= last[key] <= 1
    assert last["train/spots/top_1"] > 0.8
    assert last["train/loss"] == pytest.approx(last["train/lights/loss"] + last["train/spots/loss"])
    during = next(line for line in lines if "eval/lights/map" in line)
    # two ranks at the end of training and one rank afterwards saw the same samples
    after = evaluate_run(run, World()).metrics()
    for key in ("eval/lights/map", "eval/lights/loss", "eval/spots/top_1", "eval/spots/colour_top_5"):
        assert during[key] == pytest.approx(after[key], abs=1e-5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources.lights.target=single", "data.sources.lights.target=multi"),
        ("data.sources.lights.classes=4", "has 5 classes, any number of them"),
        ("data.sources.spots.heads={colour: 3, place: 4}", "place with 4 classes, colour with 3 classes"),
        ("data.sources.spots.heads={place: 4}", "data.sources.spots.heads={place: 4, colour: 3}"),
    ],
)
def test_a_recipe_that_takes_labels_for_others(recipe_path: Path, override: str, words: str) -> None:
    recipe = load_recipe(str(recipe_path), [override]).recipe
    with pytest.raises(DataError) as caught:
        open_sources(recipe)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources.spots.classes=9", "data.sources.spots.classes=9: must be 7, the sum over `heads`"),
        ("data.sources.spots.target=multi", "data.sources.spots.target=multi: does not go with `heads"),
        ("data.sources.lights.target=heads", "data.sources.lights.target=heads: needs `heads"),
        ("data.sources.lights.classes=null", "data.sources.lights.classes=null: must be greater than 0"),
    ],
)
def test_labels_that_contradict_themselves(recipe_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe_path), [override])
    assert words in str(caught.value)


def test_losses_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6), (torch.rand(4, 6) < 0.3).float()
    plain = F.binary_cross_entropy(logits.sigmoid(), labels)
    torch.testing.assert_close(binary_cross_entropy(logits, labels), plain)
    mixing = Mixing(torch.tensor([0.7, 0.7, 0.2, 0.2]))
    share = mixing.share.unsqueeze(1)
    mixed = 0.9 * (share * labels + (1 - share) * labels[[1, 0, 3, 2]]) + 0.1 / 6
    torch.testing.assert_close(
        source_loss(TargetSpec.multi(6), logits, labels, 0.1, mixing),
        F.binary_cross_entropy(logits.sigmoid(), mixed),
    )
    pair = torch.tensor([[0, 3], [1, 2], [1, 0], [0, 1]])
    torch.testing.assert_close(
        source_loss(TargetSpec.of_heads({"verb": 2, "noun": 4}), logits, pair, 0.1),
        F.cross_entropy(logits[:, :2], pair[:, 0], label_smoothing=0.1)
        + F.cross_entropy(logits[:, 2:], pair[:, 1], label_smoothing=0.1),
    )


def test_a_blind_multi_label_model_is_told(recipe_path: Path) -> None:
    """It comes to the entropy of the classes' shares, and its best guess is the most frequent class."""
    recipe: Recipe = load_recipe(str(recipe_path), ["guards.collapse=3"]).recipe
    shares = [0.4, 0.4, 0.4, 0.4, 0.0]
    blind = -4 / 5 * (0.4 * math.log(0.4) + 0.6 * math.log(0.6))

    def watch(loss: float, hit: float) -> None:
        guard = CollapseGuard(recipe, {"lights": shares})
        point = {"train/lights/loss": loss, "train/lights/hit_1": hit, "train/lr": 1e-3}
        for step in range(6, 10):
            guard.look(step, {**point, "train/spots/loss": 0.5, "train/spots/top_1": 0.9})

    watch(0.8 * blind, 0.4)
    watch(blind, 0.8)
    with pytest.raises(TrainingStopped, match=r"source lights.*entropy of the classes' shares"):
        watch(blind, 0.4)


def test_inputs_that_do_not_fit_together(tmp_path: Path) -> None:
    build: Callable[..., Any] = Collection
    picture = draw(tmp_path / "a.png", [], 0)
    entry = Entry("a.png", "a", None, picture, ("nw", "pink"))
    with pytest.raises(DataError, match=r"a\.png: in data set 'spots' there is no class 'pink'"):
        inventory([build("spots", "train", "image", (), [entry], target="heads", heads=HEADS)])
    entry = Entry("a.png", "a", None, picture, ("nw",))
    with pytest.raises(DataError, match="a class for each of place, colour"):
        inventory([build("spots", "train", "image", (), [entry], target="heads", heads=HEADS)])
