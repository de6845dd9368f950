"""Verifying finds every changed byte, says where it lies, and fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.data.manifest import MANIFEST_NAME, SAMPLES_NAME, VERSION, Manifest
from framework.files import hash_file


@pytest.fixture
def shards(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_video: Callable[..., bytes],
    tmp_path: Path,
) -> Path:
    root = class_folders({f"{'ab'[i % 2]}/{i}.mp4": make_video(10 + i, seed=i) for i in range(6)})
    out = tmp_path / "shards"
    assert (
        tubeworks(
            "shard", "folder", "--input", root, "--name", "clips", "--out", out, "--shard-samples", 2
        ).code
        == 0
    )
    return out


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [1, 2])
def test_good_shards(tubeworks: Callable[..., Any], shards: Path, workers: int) -> None:
    done = tubeworks("verify", shards, "--decode", "--workers", workers, "--json")
    assert done.code == 0
    assert (done.json["ok"], done.json["samples"], done.json["shards"]) == (True, 6, 3)
    assert done.json["problems"] == []
    assert "no problems" in tubeworks("verify", shards).stdout


def test_a_flipped_byte_of_a_sample_names_the_sample(tubeworks: Callable[..., Any], shards: Path) -> None:
    sample = Manifest.open(shards).sample(3)
    flip(shards / sample.shard, sample.offset + sample.length // 2)
    done = tubeworks("verify", shards, "--json", "--workers", 2)
    assert done.code == 3
    assert not done.json["ok"]
    problems = {(problem["file"], problem["key"], problem["offset"]) for problem in done.json["problems"]}
    assert problems == {(sample.shard, sample.key, sample.offset), (sample.shard, None, None)}
    text = tubeworks("verify", shards)
    assert text.code == 3
    assert sample.key in text.stdout


def test_a_flipped_byte_between_samples_names_the_shard(tubeworks: Callable[..., Any], shards: Path) -> None:
    sample = Manifest.open(shards).sample(0)
    label = sample.offset + (sample.length + 511) // 512 * 512 + 512
    flip(shards / sample.shard, label)
    done = tubeworks("verify", shards, "--json")
    assert done.code == 3
    [problem] = done.json["problems"]
    assert problem["file"] == sample.shard
    assert "labels or tar headers were changed" in problem["problem"]


def test_a_flipped_byte_of_the_table(tubeworks: Callable[..., Any], shards: Path) -> None:
    flip(shards / SAMPLES_NAME, (shards / SAMPLES_NAME).read_bytes().index(b"clips/"))
    done = tubeworks("verify", shards, "--json")
    assert done.code == 3
    assert SAMPLES_NAME in {problem["file"] for problem in done.json["problems"]}


def test_missing_and_short_shards(tubeworks: Callable[..., Any], shards: Path) -> None:
    whole = (shards / "shard-000001.tar").read_bytes()
    (shards / "shard-000001.tar").write_bytes(whole[:-512])
    done = tubeworks("verify", shards)
    assert (done.code, done.stdout) == (3, "")
    assert re.match("error: .*shard-000001.tar", done.stderr)
    (shards / "shard-000001.tar").unlink()
    done = tubeworks("verify", shards, "--json")
    assert (done.code, done.json["ok"]) == (3, False)
    assert "shard-000001.tar" in done.json["problems"][0]["problem"]


def test_a_later_manifest_asks_for_an_upgrade(tubeworks: Callable[..., Any], shards: Path) -> None:
    path = shards / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": VERSION + 1}))
    for command in ("verify", "inspect"):
        done = tubeworks(command, shards)
        assert done.code == 3
        assert "upgrade tubeworks" in done.stdout + done.stderr


def test_a_changed_manifest_and_one_without_a_checksum(tubeworks: Callable[..., Any], shards: Path) -> None:
    path = shards / MANIFEST_NAME
    whole = path.read_text()
    assert "no checksum" not in tubeworks("verify", shards).stdout
    path.write_text(whole.replace('"a"', '"A"'))
    done = tubeworks("verify", shards, "--json")
    assert (done.code, "its checksum is not that" in done.json["problems"][0]["problem"]) == (3, True)
    content = json.loads(whole)
    del content["blake2b"]
    path.write_text(json.dumps(content))
    done = tubeworks("verify", shards)
    assert (done.code, "manifest.json has no checksum of its own" in done.stdout) == (0, True)
    assert tubeworks("verify", shards, "--json").json["manifest_checksum"] is False


def test_decoding_finds_what_checksums_cannot(
    tubeworks: Callable[..., Any], shards: Path, make_video: Callable[..., bytes]
) -> None:
    """A manifest that was made for other frames than are there, with all checksums right."""
    manifest = Manifest.open(shards)
    key = manifest.sample(0).key
    table = bytearray((shards / SAMPLES_NAME).read_bytes())
    frames = manifest.column("frames").tobytes()
    place = table.index(frames)
    table[place] ^= 1
    (shards / SAMPLES_NAME).write_bytes(table)
    content = json.loads((shards / MANIFEST_NAME).read_text())
    content["samples"]["blake2b"] = hash_file(shards / SAMPLES_NAME)
    del content["samples"]["blocks"], content["blake2b"]  # as an earlier version wrote it
    (shards / MANIFEST_NAME).write_text(json.dumps(content))
    assert tubeworks("verify", shards).code == 0
    done = tubeworks("verify", shards, "--decode", "--json")
    assert done.code == 3
    [problem] = done.json["problems"]
    assert problem["key"] == key
    assert "frames" in problem["problem"]


def test_inspect_tells_sizes_durations_and_rates(tubeworks: Callable[..., Any], shards: Path) -> None:
    summary = tubeworks("inspect", shards, "--json").json
    [dataset] = summary["datasets"]
    assert (summary["samples"], summary["shards"], dataset["classes"]) == (6, 3, {"a": 3, "b": 3})
    assert dataset["frames"] == {"min": 10, "median": 12.5, "max": 15}
    assert dataset["fps"] == {"min": 10, "median": 10, "max": 10}
    assert dataset["seconds"]["total"] == pytest.approx(7.5)
    text = tubeworks("inspect", shards).stdout
    assert "6 samples in 3 shards" in text
    assert "64 px" in text
