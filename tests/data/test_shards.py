"""Promises of byte access: verified bytes, bounded open files, errors that name the place."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.data.manifest import Manifest
from framework.data.shards import ShardReader
from framework.errors import CorruptSample, DataError


def test_bytes_are_those_that_were_written(shards: Path, media: list) -> None:
    manifest = Manifest.open(shards)
    reader = ShardReader(shards, "moves", open_files=2)
    expected = {medium.key: medium.data for medium in media}
    for index in [*range(len(manifest)), *reversed(range(len(manifest)))]:
        sample = manifest.sample(index)
        data = reader.read(sample)
        reader.verify(sample, data)
        assert data == expected[sample.key]


def test_open_files_are_bounded_and_closed(shards: Path) -> None:
    def open_shards() -> int:
        targets = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        return sum(target.endswith(".tar") for target in targets)

    manifest = Manifest.open(shards)
    assert len(manifest.shards) > 3
    reader = ShardReader(shards, "moves", open_files=2)
    for index in range(len(manifest)):
        reader.read(manifest.sample(index))
        assert open_shards() <= 2
    reader.close()
    assert open_shards() == 0
    assert reader.read(manifest.sample(0))


def test_a_forked_process_reads_the_same_bytes(shards: Path) -> None:
    manifest = Manifest.open(shards)
    reader = ShardReader(shards, "moves")
    expected = [reader.read(manifest.sample(index)) for index in range(len(manifest))]
    pids = []
    for _ in range(3):  # all of them read through the same descriptors at the same time
        pid = os.fork()
        if pid == 0:
            same = all(reader.read(manifest.sample(i)) == data for i, data in enumerate(expected * 1))
            os._exit(0 if same else 1)
        pids.append(pid)
    assert all(reader.read(manifest.sample(i)) == data for i, data in enumerate(expected))
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]


def test_a_flipped_bit_is_found_and_placed(shards: Path, tmp_path: Path, flip_byte: Callable) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    manifest = Manifest.open(folder)
    sample = manifest.sample(7)
    flip_byte(folder, manifest, 7)
    reader = ShardReader(folder, "moves")
    with pytest.raises(CorruptSample, match="checksum") as caught:
        reader.verify(sample, reader.read(sample))
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.source, error.shard, error.key, error.offset) == (
        "moves",
        sample.shard,
        sample.key,
        sample.offset,
    )
    for part in (sample.shard, sample.key, str(sample.offset), "on_corrupt=substitute"):
        assert part in str(error)


def test_a_shard_that_shrank_or_went_away(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    manifest = Manifest.open(folder)
    sample = manifest.sample(2)
    reader = ShardReader(folder, "moves")
    os.truncate(folder / sample.shard, sample.offset + 5)
    with pytest.raises(CorruptSample, match="the shard ends after 5 of"):
        reader.read(sample)
    reader.close()
    (folder / sample.shard).unlink()
    with pytest.raises(DataError, match=rf"{sample.shard} is missing"):
        reader.read(sample)
    (folder / sample.shard).mkdir()
    with pytest.raises(DataError, match="cannot read"):
        reader.read(sample)


def test_a_place_that_no_file_has(shards: Path) -> None:
    sample = dataclasses.replace(Manifest.open(shards).sample(0), offset=2**64 - 1)
    with pytest.raises(DataError, match=f"cannot read .* at offset {2**64 - 1} of .*shard-000000.tar"):
        ShardReader(shards, "moves").read(sample)
