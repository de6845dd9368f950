"""Moving digits: the label lies in the order of frames and nowhere else, and held-out digits are new."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from data_tools.synth import DIRECTIONS, MotionClip, SynthOptions, synthesize
from framework.data.manifest import Manifest
from framework.errors import DataError

SMALL = ("--train-videos", 64, "--val-videos", 16, "--train-images", 60, "--val-images", 20)


def payloads(folder: Path, dataset: str) -> list[tuple[bytes, Any, str]]:
    """(media bytes, sample, source) of all samples of a data set."""
    manifest = Manifest.open(folder)
    members: dict[str, bytes] = {}
    for shard in manifest.shards:
        with tarfile.open(folder / shard.name) as archive:
            members |= {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
    found = []
    for index in manifest.select(dataset, dataset, manifest.dataset(dataset).kind).tolist():
        sample = manifest.sample(index)
        source = json.loads(members[f"{sample.key}.json"])["source"]
        found.append((members[f"{sample.key}.{sample.extension}"], sample, source))
    return found


def decode(data: bytes) -> numpy.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return numpy.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])


def test_two_sets_of_mixed_shards(tubeworks: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "digits"
    done = tubeworks("synth", "--out", out, *SMALL, "--frames", 6, "--size", 24, "--json")
    assert done.code == 0, done.stderr
    assert {split: report["written"] for split, report in done.json.items()} == {"train": 124, "val": 36}
    for split in ("train", "val"):
        assert tubeworks("verify", out / split, "--decode").code == 0
        motion, digits = Manifest.open(out / split).datasets
        assert (motion.name, motion.kind, motion.classes) == ("motion", "video", tuple(DIRECTIONS))
        assert (digits.name, digits.kind, digits.classes) == ("digits", "image", tuple("0123456789"))
    manifest = Manifest.open(out / "train")
    assert set(
        Counter(manifest.column("label")[manifest.select("motion", "", "video")].tolist()).values()
    ) == {8}
    assert set(manifest.column("width").tolist()) == {24}
    assert set(manifest.column("frames").tolist()) == {1, 6}
    assert set(manifest.column("extension").tolist()) == {"mp4", "jpg"}


def test_held_out_digits_were_written_by_other_hands(tubeworks: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "digits"
    tubeworks("synth", "--out", out, *SMALL, "--frames", 2, "--size", 16)
    numbers: dict[str, set[int]] = {}
    target = load_digits().target
    for split in ("train", "val"):
        sources = [
            (sample, source)
            for name in ("motion", "digits")
            for _, sample, source in payloads(out / split, name)
        ]
        numbers[split] = {int(source[-8:-4]) for _, source in sources}
        for sample, source in sources:
            if sample.dataset == "digits":
                assert sample.label == target[int(source[-8:-4])]
    assert numbers["train"]
    assert numbers["val"]
    assert not numbers["train"] & numbers["val"]


def test_the_same_bytes_again_and_from_more_workers(
    tubeworks: Callable[..., Any], contents: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    small = (*SMALL, "--frames", 3, "--size", 16)
    for name, more in (("one", ()), ("two", ("--workers", 2)), ("other", ("--seed", 1))):
        assert tubeworks("synth", "--out", tmp_path / name, *small, *more).code == 0
    for split in ("train", "val"):
        assert contents(tmp_path / "one" / split) == contents(tmp_path / "two" / split)
        assert contents(tmp_path / "one" / split) != contents(tmp_path / "other" / split)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]


def test_every_frame_is_uniform_on_the_torus_whatever_the_direction() -> None:
    """Over all starts, each frame shows the digit once at every place: the same pictures for all classes."""
    pixels = load_digits().data[0].astype(numpy.uint8).tobytes()
    seen: dict[str, list[frozenset[bytes]]] = {}
    for name, (dx, dy) in DIRECTIONS.items():
        clips = [
            MotionClip(pixels, 16, 4, (x, y), (3 * dx, 3 * dy)).draw() for x in range(16) for y in range(16)
        ]
        seen[name] = [frozenset(clip[t].tobytes() for clip in clips) for t in range(4)]
        assert all(len(pictures) == 256 for pictures in seen[name])
    assert len({tuple(pictures) for pictures in seen.values()}) == 1


def test_only_the_order_of_frames_tells_the_direction(tubeworks: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "digits"
    counts = ("--train-videos", 800, "--val-videos", 240, "--train-images", 0, "--val-images", 0)
    assert tubeworks("synth", "--out", out, *counts, "--frames", 4, "--size", 24).code == 0
    clips: dict[str, numpy.ndarray] = {}
    labels: dict[str, numpy.ndarray] = {}
    for split in ("train", "val"):
        read = payloads(out / split, "motion")
        clips[split] = numpy.stack([decode(data) for data, _, _ in read]).astype(numpy.float32)
        labels[split] = numpy.array([sample.label for _, sample, _ in read])
    for frame in (0, 3):  # the first frame, and one that was predicted from others
        guess = KNeighborsClassifier(5).fit(clips["train"][:, frame].reshape(800, -1), labels["train"])
        accuracy = guess.score(clips["val"][:, frame].reshape(240, -1), labels["val"])
        assert accuracy < 0.22, "one frame must not tell more than chance (0.125)"

    spectrum = numpy.fft.fft2(clips["val"] - clips["val"].mean(axis=(2, 3), keepdims=True))
    correlation = numpy.fft.ifft2(spectrum[:, 1:] * spectrum[:, :-1].conj()).real.sum(axis=1)
    best = correlation.reshape(len(correlation), -1).argmax(axis=1)
    dy, dx = ((best // 24 + 12) % 24 - 12, (best % 24 + 12) % 24 - 12)
    steps = list(DIRECTIONS.values())
    told = [steps.index((int(numpy.sign(x)), int(numpy.sign(y)))) for x, y in zip(dx, dy, strict=True)]
    assert (numpy.array(told) == labels["val"]).mean() > 0.95, "two frames in their order tell it"


def test_digits_in_pictures_can_be_read(tubeworks: Callable[..., Any], tmp_path: Path) -> None:
    """Nearest neighbours on the aligned digit: the pictures show what their label says."""
    out = tmp_path / "digits"
    counts = ("--train-videos", 0, "--val-videos", 0, "--train-images", 1200, "--val-images", 200)
    assert tubeworks("synth", "--out", out, *counts, "--size", 24).code == 0

    def aligned(split: str) -> tuple[numpy.ndarray, list[int]]:
        rows, labels = [], []
        for data, sample, _ in payloads(out / split, "digits"):
            picture = numpy.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(numpy.float32)
            mass = numpy.where(picture > 60, picture, 0)
            y, x = (
                round(float((mass.sum(axis=1 - axis) * numpy.arange(24)).sum() / mass.sum()))
                for axis in (0, 1)
            )
            rows.append(numpy.roll(picture, (12 - y, 12 - x), axis=(0, 1)).ravel())
            labels.append(sample.label)
        return numpy.stack(rows), labels

    guess = KNeighborsClassifier(3).fit(*aligned("train"))
    assert guess.score(*aligned("val")) > 0.85


@pytest.mark.parametrize(("option", "value"), [("--size", 33), ("--size", 8), ("--frames", 1)])
def test_sizes_that_do_not_work(
    tubeworks: Callable[..., Any], tmp_path: Path, option: str, value: int
) -> None:
    done = tubeworks("synth", "--out", tmp_path / "digits", option, value)
    assert done.code == 3
    assert option in done.stderr


def test_existing_sets_are_replaced_only_when_asked(tubeworks: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "digits"
    small = ("--train-videos", 8, "--val-videos", 8, "--train-images", 8, "--val-images", 8, "--size", 16)
    assert tubeworks("synth", "--out", out, *small).code == 0
    before = Manifest.open(out / "train").hash
    done = tubeworks("synth", "--out", out, *small, "--seed", 1)
    assert done.code == 3
    assert "exists already" in done.stderr
    assert tubeworks("synth", "--out", out, *small, "--seed", 1, "--overwrite").code == 0
    assert Manifest.open(out / "train").hash != before
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "shards").touch()
    with pytest.raises(DataError, match="shards: is a file; choose another --out"):
        synthesize(SynthOptions(tmp_path / "shards"))
