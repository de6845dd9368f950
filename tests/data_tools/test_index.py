"""Shards of others are indexed where they lie; coverage and costs are reported."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.data.manifest import Manifest

Shards = Callable[..., Any]


def foreign(path: Path, samples: dict[str, dict[str, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    """A shard as img2dataset writes it: KEY.jpg, KEY.txt, KEY.json, with times and owners."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime, info.uname = len(data), 1_700_000_000.25, "someone"
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(make_image: Callable[..., bytes], tmp_path: Path) -> Path:
    """Two shards with five pictures, one of them broken, one sample without a picture."""
    folder = tmp_path / "foreign"

    def sample(seed: int, caption: str) -> dict[str, bytes]:
        about = {
            "caption": caption,
            "label": ["red", "blue", "red"][seed % 3],
            "tags": ["x", "y"][: seed % 3],
        }
        return {"jpg": make_image(seed=seed), "txt": caption.encode(), "json": json.dumps(about).encode()}

    foreign(folder / "00000.tar", {f"{n:09d}": sample(n, "é" * 60) for n in range(3)})
    second = {f"{10_000 + n:09d}": sample(n, "b") for n in range(3)}
    second["000010001"]["jpg"] = b"broken"
    del second["000010002"]["jpg"]
    foreign(folder / "00001.tar", second, tarfile.GNU_FORMAT)
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_shards_of_others_are_read_and_never_written(tubeworks: Shards, shards: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards.iterdir()}
    done = tubeworks(
        "index", shards, "--name", "laion", "--kind", "image", "--label-from", "json:label", "--workers", 2,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert (done.json["written"], done.json["shards"]) == (4, 2)
    reasons = {row["key"]: row["reason"] for row in done.json["failed"]}
    assert reasons.keys() == {"000010001", "000010002"}
    assert "no image in it (there is json, txt)" in reasons["000010002"]
    after = {name: ((shards / name).read_bytes(), (shards / name).stat().st_mtime_ns) for name in before}
    assert after == before
    added = {"manifest.json", "samples.arrow", "report.json", "laion.classes.txt"}
    assert {path.name for path in shards.iterdir()} - set(before) == added
    manifest = Manifest.open(shards)
    assert manifest.has_checksum
    assert manifest.datasets[0].classes == ("blue", "red")
    found = list(map(manifest.sample, range(4)))
    assert [sample.label for sample in found] == [1, 0, 1, 1]
    for sample in found:
        data = (shards / sample.shard).read_bytes()
        assert data[sample.offset :][:2] == b"\xff\xd8"
    assert tubeworks("verify", shards, "--decode").code == 0
    again = tubeworks("index", shards, "--name", "laion", "--kind", "image")
    assert (again.code, "manifest.json already" in again.stderr) == (3, True)


def test_labels_of_several_kinds(tubeworks: Shards, shards: Path, tmp_path: Path) -> None:
    common = ("index", shards, "--name", "laion", "--kind", "image", "--overwrite", "--label-from")
    assert tubeworks(*common, "none").code == 0
    assert set(Manifest.open(shards).column("label")) == {-1}
    assert tubeworks(*common, "json:tags").code == 0
    manifest = Manifest.open(shards)
    assert (manifest.datasets[0].target, manifest.datasets[0].classes) == ("multi", ("x", "y"))
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\n")
    refused = tubeworks(*common, "json:label", "--classes", names)
    assert (refused.code, "not in the list of classes: blue" in refused.stderr) == (3, True)
    missing = tubeworks(*common, "cls")
    assert (missing.code, "nothing was written" in missing.stderr) == (3, True)
    wrong = tubeworks(*common, "caption")
    assert (wrong.code, "cls, none or json:FIELD" in wrong.stderr) == (3, True)


def test_numbers_as_labels_and_video(
    tubeworks: Shards, make_video: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    clips = {f"v/{n}": {"mp4": make_video(4 + n, seed=n), "cls": str(2 * n).encode()} for n in range(2)}
    foreign(folder / "a.tar", clips)
    common = ("index", folder, "--name", "clips", "--kind", "video", "--overwrite")
    assert tubeworks(*common).code == 0
    manifest = Manifest.open(folder)
    assert manifest.datasets[0].classes == ("0", "1", "2")
    assert [(s.label, s.frames) for s in map(manifest.sample, range(2))] == [(0, 4), (2, 5)]
    foreign(folder / "b.tar", {"v/9": {"mp4": make_video(4), "cls": b"99999999999"}})
    wrong = tubeworks(*common)
    assert (wrong.code, "no number of a class" in wrong.stderr) == (3, True)
    (folder / "b.tar").unlink()
    names = tmp_path / "names.txt"
    names.write_text("run\nswim\nfly\n")
    assert tubeworks(*common, "--classes", names).code == 0
    manifest = Manifest.open(folder)
    assert [manifest.datasets[0].classes[s.label] for s in map(manifest.sample, range(2))] == ["run", "fly"]


def test_a_damaged_shard_keeps_what_is_before_the_damage(tubeworks: Shards, shards: Path) -> None:
    path = shards / "00000.tar"
    with tarfile.open(path) as archive:
        second = archive.getmember("000000001.jpg")
    data = bytearray(path.read_bytes())
    header = second.offset_data - 512
    data[header : header + 512] = b"\xee" * 512
    path.write_bytes(bytes(data))
    done = tubeworks("index", shards, "--name", "laion", "--kind", "image", "--label-from", "none", "--json")
    assert done.code == 0, done.stderr
    assert done.json["written"] == 2
    assert any("damaged from here on" in row["reason"] for row in done.json["failed"])


def test_a_file_that_is_no_archive_is_called_so(tubeworks: Shards, shards: Path) -> None:
    (shards / "text.tar").write_text("a file of text, whatever its name says\n")
    done = tubeworks("index", shards, "--name", "laion", "--kind", "image", "--label-from", "none", "--json")
    assert done.code == 0, done.stderr
    assert [row["key"] for row in done.json["failed"] if "not a tar archive" in row["reason"]] == ["text.tar"]


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("../climbed.jpg", tarfile.REGTYPE, "leads out of the archive"),
        ("/rooted.jpg", tarfile.REGTYPE, "leads out of the archive"),
        ("soft.jpg", tarfile.SYMTYPE, "a link inside an archive (to '000000000.jpg')"),
        ("hard.jpg", tarfile.LNKTYPE, "a link inside an archive (to '000000000.jpg')"),
        ("device.jpg", tarfile.CHRTYPE, "not a regular file"),
        ("pipe.jpg", tarfile.FIFOTYPE, "not a regular file"),
        ("a\x1b[2Jb.jpg", tarfile.REGTYPE, "control characters"),
    ],
)
def test_strange_members_of_served_shards_are_left_out_by_name(
    tubeworks: Shards, make_image: Callable[..., bytes], tmp_path: Path, name: str, kind: bytes, reason: str
) -> None:
    folder = tmp_path / "foreign"
    foreign(folder / "0.tar", {f"{n:09d}": {"jpg": make_image(seed=n)} for n in range(2)})
    with tarfile.open(folder / "0.tar", "a") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "000000000.jpg"
        data = make_image(seed=3) if kind == tarfile.REGTYPE else b""
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    common = ("index", folder, "--name", "laion", "--kind", "image", "--label-from", "none", "--overwrite")
    done = tubeworks(*common, "--json")
    assert done.code == 0, done.stderr
    [failure] = done.json["failed"]
    assert (done.json["written"], failure["key"]) == (2, name.removesuffix(".jpg"))
    assert reason in failure["reason"]
    assert "\x1b" not in tubeworks(*common).stdout
    assert tubeworks("verify", folder, "--decode").code == 0


def test_a_pipe_among_the_shards_is_an_error_and_no_hang(tubeworks: Shards, shards: Path) -> None:
    os.mkfifo(shards / "00002.tar")
    done = tubeworks("index", shards, "--name", "laion", "--kind", "image")
    assert (done.code, "00002.tar: not a file" in done.stderr) == (3, True)


@pytest.fixture
def kinetics_shards(
    tubeworks: Shards,
    kinetics: Callable[..., tuple[Path, Path]],
    make_video: Callable[..., bytes],
    tmp_path: Path,
) -> tuple[Path, Path]:
    rows = ["zumba,aaa,0,10,train", "yoga,bbb,0,10,train", "yoga,ccc,0,10,train", "yoga,ddd,0,10,val"]
    videos, annotations = kinetics(
        {f"{name}_000000_000010.mp4": make_video(6, seed=n) for n, name in enumerate(("aaa", "bbb"))}, rows
    )
    done = tubeworks(
        "shard", "kinetics", "--videos", videos, "--annotations", annotations, "--split", "train",
        "--out", tmp_path / "k400",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    return tmp_path / "k400", annotations


def test_coverage_of_an_official_list(
    tubeworks: Shards, kinetics_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, annotations = kinetics_shards
    done = tubeworks("verify", folder, "--official", annotations, "--json")
    assert done.code == 0, done.stderr
    coverage = done.json["coverage"]
    assert (coverage["listed"], coverage["present"], coverage["percent"]) == (3, 2, 66.667)
    assert (coverage["missing"], coverage["unlisted"]) == (["ccc_000000_000010"], 0)
    assert "66.67 % there (2 of 3)" in tubeworks("verify", folder, "--official", annotations).stdout
    other = tmp_path / "other.csv"
    other.write_text(annotations.read_text().replace("zumba,aaa", "yoga,aaa"))
    done = tubeworks("verify", folder, "--official", other)
    assert (done.code, "another class than the official list" in done.stdout) == (3, True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("yoga\nzumba\n", ""),
        ("zumba\nyoga\n", "label 0 is 'yoga', there it is 'zumba'"),
        ("yoga\nzumba\nboxing\n", "1 class of it not there (boxing)"),
    ],
)
def test_classes_are_compared_with_the_official_list(
    tubeworks: Shards, kinetics_shards: tuple[Path, Path], tmp_path: Path, names: str, message: str
) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(names)
    done = tubeworks("verify", kinetics_shards[0], "--classes", path)
    assert (done.code == 3) == bool(message)
    assert message in done.stdout


def test_bench_says_what_shards_cost(tubeworks: Shards, kinetics_shards: tuple[Path, Path]) -> None:
    folder, _ = kinetics_shards
    done = tubeworks("bench", folder, "--presets", "--samples", 2, "--samples-per-second", 100, "--json")
    assert done.code == 0, done.stderr
    assert [row["preset"] for row in done.json["rows"]] == ["as it is", "balanced", "fast"]
    for row in done.json["rows"]:
        assert row["cores_per_gpu"] == pytest.approx(row["cpu_ms"] / 10, abs=0.01)
        assert row["clips_per_second_per_core"] == pytest.approx(1000 / row["cpu_ms"], abs=0.1)
        assert row["bytes_per_sample"] > 0
        assert row["memory_mb"] > 0
    text = tubeworks("bench", folder, "--samples", 1).stdout
    assert "cores for a GPU are not known" in text


def test_bench_measures_stills_of_a_video_data_set(
    tubeworks: Shards, kinetics_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, _ = kinetics_shards
    classes = len(Manifest.open(folder).datasets[0].classes)
    source = f"{{path: {folder}, kind: image, still: center, classes: {classes}, size: 32}}"
    data = f"{{sources: {{frames: {source}}}, mixture: {{frames: 4}}}}"
    recipe = tmp_path / "stills.yaml"
    recipe.write_text(
        f"name: stills\nmodel: {{name: vit_ti}}\ndata: {data}\n"
        "optimizer: {lr: 1e-3}\ntrain: {steps: 10}\n"
    )
    done = tubeworks("bench", folder, recipe, "--samples", 1, "--samples-per-second", 9, "--json")
    assert done.code == 0, done.stderr
    assert done.json["rows"][0]["cpu_ms"] > 0
