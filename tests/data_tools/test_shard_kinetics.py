"""Kinetics lists become shards; what is not there or not good is named, and never fatal."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.data.manifest import Manifest

ROWS = [
    "arm wrestling,goodVideo01,0,10,train",
    "zumba,-Dashes_-abc,5,15,train",
    "massaging person's head,apostroph_e,0,10,train",
    "arm wrestling,nowhere_to_,3,13,train",
    "zumba,emptyVideo1,0,10,train",
    "zumba,truncated01,0,10,train",
    "abseiling,webPage0001,0,10,train",
    "zumba,soundOnly01,0,10,train",
    "zumba,validation_,0,10,val",
]


@pytest.fixture
def download(
    kinetics: Callable[..., tuple[Path, Path]], make_video: Callable[..., bytes]
) -> tuple[Path, Path]:
    good = make_video(20)
    files = {
        "goodVideo01_000000_000010.mp4": good,
        "-Dashes_-abc_000005_000015.mp4": make_video(30, seed=1),
        "apostroph_e_000000_000010.mp4": make_video(12, seed=2),
        "emptyVideo1_000000_000010.mp4": b"",
        "truncated01_000000_000010.mp4": good[: len(good) * 3 // 4],
        "webPage0001_000000_000010.mp4": b"<!DOCTYPE html><title>Video unavailable</title>",
        "soundOnly01_000000_000010.mp4": make_video(video=False, audio=True),
        "validation__000000_000010.mp4": make_video(9, seed=3),
    }
    return kinetics(files, ROWS)


def test_a_download_with_all_its_defects(
    tubeworks: Callable[..., Any], download: tuple[Path, Path], tmp_path: Path
) -> None:
    videos, annotations = download
    out = tmp_path / "shards"
    done = tubeworks(
        "shard", "kinetics", "--videos", videos, "--annotations", annotations, "--split", "train",
        "--out", out, "--json",
    )  # fmt: skip
    assert done.code == 0
    report = done.json
    assert set(report) == {"written", "missing", "failed", "shards", "bytes", "reasons"}
    assert (report["written"], report["shards"]) == (3, 1)
    assert report["bytes"] == (out / "shard-000000.tar").stat().st_size
    assert report["missing"] == ["nowhere_to__000003_000013.mp4"]
    reasons = {failure["key"]: failure["reason"] for failure in report["failed"]}
    assert reasons.keys() == {
        f"k400/{name}_000000_000010" for name in ("emptyVideo1", "truncated01", "webPage0001", "soundOnly01")
    }
    assert "empty" in reasons["k400/emptyVideo1_000000_000010"]
    assert "truncated" in reasons["k400/truncated01_000000_000010"]
    assert "web page" in reasons["k400/webPage0001_000000_000010"]
    assert "audio only" in reasons["k400/soundOnly01_000000_000010"]

    manifest = Manifest.open(out)
    [dataset] = manifest.datasets
    assert dataset.classes == ("abseiling", "arm wrestling", "massaging person's head", "zumba")
    assert (dataset.name, dataset.split, dataset.kind, dataset.samples) == ("k400", "train", "video", 3)
    samples = {sample.key: sample for sample in map(manifest.sample, range(3))}
    assert samples["k400/goodVideo01_000000_000010"].label == 1
    assert samples["k400/-Dashes_-abc_000005_000015"].label == 3
    assert samples["k400/apostroph_e_000000_000010"].label == 2
    assert samples["k400/-Dashes_-abc_000005_000015"].frames == 30
    assert samples["k400/-Dashes_-abc_000005_000015"].keyframes.tolist() == [0, 8, 16, 24]
    with tarfile.open(out / "shard-000000.tar") as archive:
        about = json.load(archive.extractfile("k400/apostroph_e_000000_000010.json"))  # type: ignore[arg-type]
    assert about["class"] == "massaging person's head"
    assert about["source"] == "apostroph_e_000000_000010.mp4"


def test_people_read_the_same_report(
    tubeworks: Callable[..., Any], download: tuple[Path, Path], tmp_path: Path
) -> None:
    videos, annotations = download
    done = tubeworks(
        "shard", "kinetics", "--videos", videos, "--annotations", annotations, "--split", "train",
        "--out", tmp_path / "shards",
    )  # fmt: skip
    assert done.code == 0
    assert "3 samples in 1 shard," in done.stdout
    for name in ("nowhere_to__000003_000013", "emptyVideo1", "truncated01", "webPage0001", "soundOnly01"):
        assert name in done.stdout


def test_held_out_clips_get_the_labels_of_the_training_shards(
    tubeworks: Callable[..., Any], download: tuple[Path, Path], tmp_path: Path
) -> None:
    videos, annotations = download
    train, val = tmp_path / "train", tmp_path / "val"
    only_val = tmp_path / "val.csv"
    only_val.write_text("label,youtube_id,time_start,time_end,split\nzumba,validation_,0,10,val\n")
    common = ("shard", "kinetics", "--videos", videos)
    assert tubeworks(*common, "--annotations", annotations, "--split", "train", "--out", train).code == 0
    done = tubeworks(
        *common, "--annotations", only_val, "--split", "validate", "--classes", train, "--out", val
    )
    assert done.code == 0, done.stderr
    assert Manifest.open(val).datasets[0].classes == Manifest.open(train).datasets[0].classes
    assert Manifest.open(val).sample(0).label == 3

    names = tmp_path / "classes.txt"
    names.write_text("arm wrestling\n")
    done = tubeworks(
        *common, "--annotations", only_val, "--split", "val", "--classes", names, "--out", tmp_path / "x"
    )
    assert done.code == 3
    assert "not in the list of classes: zumba" in done.stderr


def test_class_folders_and_doubles(
    tubeworks: Callable[..., Any],
    kinetics: Callable[..., tuple[Path, Path]],
    make_video: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    right, wrong = make_video(6, seed=1), make_video(7, seed=2)
    videos, annotations = kinetics(
        {
            "arm_wrestling/sameVideo01_000000_000010.mp4": right,
            "a first folder/sameVideo01_000000_000010.mp4": wrong,
            "zumba/otherFormat_000000_000010.mkv": make_video(8, container="matroska"),
        },
        [
            "arm wrestling,sameVideo01,0,10,train",
            "zumba,otherFormat,0.0,10.0,train",
            "zumba,sameVideo01,0,10,train",
        ],
    )
    out = tmp_path / "shards"
    done = tubeworks(
        "shard", "kinetics", "--videos", videos, "--annotations", annotations, "--split", "train",
        "--out", out, "--json",
    )  # fmt: skip
    assert done.json["written"] == 2
    assert ["listed twice" in failure["reason"] for failure in done.json["failed"]] == [True]
    manifest = Manifest.open(out)
    frames = {sample.key: (sample.frames, sample.extension) for sample in map(manifest.sample, range(2))}
    assert frames["k400/sameVideo01_000000_000010"] == (6, "mp4")
    assert frames["k400/otherFormat_000000_000010"] == (8, "mkv")


def test_a_list_without_labels_gives_samples_of_unknown_class(
    tubeworks: Callable[..., Any],
    kinetics: Callable[..., tuple[Path, Path]],
    make_video: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    videos, annotations = kinetics(
        {"testVideo01_000000_000010.mp4": make_video(6)},
        ["testVideo01,0,10,test"],
        head="\ufeffyoutube_id,time_start,time_end,split",
    )
    out = tmp_path / "shards"
    assert tubeworks(
        "shard", "kinetics", "--videos", videos, "--annotations", annotations, "--split", "test",
        "--out", out,
    ).code == 0  # fmt: skip
    manifest = Manifest.open(out)
    assert manifest.sample(0).label == -1
    assert manifest.datasets[0].classes == ()
    assert tubeworks("inspect", out, "--json").json["datasets"][0]["unlabelled"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "not a Kinetics list: no column youtube_id, time_start, time_end"),
        ("label,youtube_id,time_start,time_end,split\nx,abc,zero,10,train\n", r":2: time_start and time_end"),
        ("label,youtube_id,time_start,time_end,split\nx,,0,10,train\n", r":2: the youtube_id is empty"),
        (
            "label,youtube_id,time_start,time_end,split\nx,abc,0,10,val\n",
            "no clip of split 'train'; there is val",
        ),
        ("label,youtube_id,time_start,time_end,split\n", "the list is empty"),
    ],
)
def test_lists_that_are_none(tubeworks: Callable[..., Any], tmp_path: Path, text: str, message: str) -> None:
    annotations = tmp_path / "list.csv"
    annotations.write_text(text)
    done = tubeworks(
        "shard", "kinetics", "--videos", tmp_path, "--annotations", annotations, "--split", "train",
        "--out", tmp_path / "shards",
    )  # fmt: skip
    assert done.code == 3
    assert re.search(message, done.stderr)
    assert not (tmp_path / "shards").exists()


def test_labels_with_commas_and_unicode(
    tubeworks: Callable[..., Any],
    kinetics: Callable[..., tuple[Path, Path]],
    make_video: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    labels = ["eating (with chopsticks), slowly", "jouer à la pétanque"]
    videos, annotations = kinetics(
        {f"clip{i}_000000_000010.mp4": make_video(4, seed=i) for i in range(2)}, []
    )
    with annotations.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([label, f"clip{i}", 0, 10, "train"] for i, label in enumerate(labels))
    out = tmp_path / "shards"
    done = tubeworks(
        "shard",
        "kinetics",
        "--videos",
        videos,
        "--annotations",
        annotations,
        "--split",
        "train",
        "--out",
        out,
    )
    assert done.code == 0
    assert list(Manifest.open(out).datasets[0].classes) == labels
