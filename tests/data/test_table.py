"""Promises of tables in blocks: changes are found where they are touched, at no cost where they are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.data import manifest as manifest_module
from framework.data.manifest import MANIFEST_NAME, SAMPLES_NAME, DatasetInfo, Manifest, ShardInfo
from framework.data.manifest_file import manifest_text
from framework.data.manifest_writer import write_manifest
from framework.data.sources import build_plan, open_sources
from framework.data.table import BLOCK_ROWS, Selection, Summary
from framework.errors import DataError

ROWS = 2 * BLOCK_ROWS + 1000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks of rows in two shards, clips and pictures between each other. Not to be changed."""
    folder = tmp_path_factory.mktemp("large")
    numbers = np.arange(ROWS)
    split = ROWS // 3
    video = numbers % 3 == 0
    shard = (numbers >= split).astype(np.uint32)
    for name in ("shard-000000.tar", "shard-000001.tar"):
        with (folder / name).open("wb") as file:
            file.truncate(ROWS * 1024)
    shards = [
        ShardInfo("shard-000000.tar", ROWS * 1024, "0" * 32, split),
        ShardInfo("shard-000001.tar", ROWS * 1024, "0" * 32, ROWS - split),
    ]
    columns = {
        "key": [f"key-{number}" for number in range(ROWS)],
        "shard": shard,
        "offset": numbers * 1024,
        "length": np.full(ROWS, 100),
        "crc32": numbers,
        "dataset": (~video).astype(np.uint16),
        "kind": video.astype(np.uint8),
        "label": (numbers % 3).astype(np.int32),
        "width": np.full(ROWS, 64),
        "height": np.full(ROWS, 48),
        "frames": np.where(video, 20, 1),
        "fps": np.where(video, 25.0, 0.0),
        "keyframes": [[0, number % 7] if video[number] else [] for number in range(ROWS)],
        "extension": ["mp4" if one else "jpg" for one in video],
    }
    datasets = [
        DatasetInfo("moves", "train", "video", ("a", "b", "c"), int(video.sum())),
        DatasetInfo("stills", "train", "image", ("a", "b", "c", "d"), int((~video).sum())),
    ]
    write_manifest(folder, columns, shards, datasets)
    return folder


def with_table(large: Path, folder: Path, change: Callable[[bytearray], None]) -> Path:
    """The same folder with a table of its own."""
    folder.mkdir()
    for path in large.iterdir():
        if path.name != SAMPLES_NAME:
            (folder / path.name).symlink_to(path)
    data = bytearray((large / SAMPLES_NAME).read_bytes())
    change(data)
    (folder / SAMPLES_NAME).write_bytes(bytes(data))
    return folder


def flip_label(row: int) -> Callable[[bytearray], None]:
    labels = (np.arange(ROWS) % 3).astype(np.int32).tobytes()

    def change(data: bytearray) -> None:
        place = bytes(data).index(labels) + 4 * row
        data[place] ^= 1

    return change


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat tables of any size as large."""
    monkeypatch.setattr(manifest_module, "EAGER_BYTES", 0)


@pytest.mark.parametrize("row", [0, BLOCK_ROWS - 1, BLOCK_ROWS, ROWS - 1])
def test_a_flipped_label_is_found_where_its_block_is_touched(
    row: int, large: Path, tmp_path: Path, make_recipe: Callable, lazily: None
) -> None:
    folder = with_table(large, tmp_path / "changed", flip_label(row))
    sources = open_sources(make_recipe(folder))
    opened = sources["moves" if row % 3 == 0 else "stills"]
    manifest = opened.manifest
    index = int(np.flatnonzero(np.asarray(opened.selection) == row)[0])
    with pytest.raises(DataError, match=rf"rows from {row // BLOCK_ROWS * BLOCK_ROWS} on .*labels or places"):
        manifest.sample(row)
    with pytest.raises(DataError, match="labels or places"):
        opened.keys(np.array([index]))
    other = 0 if row >= BLOCK_ROWS else ROWS - 1
    assert manifest.sample(other).label == other % 3
    build_plan(make_recipe(folder), sources).step(0)


def test_a_small_table_is_checked_before_the_first_step(
    large: Path, tmp_path: Path, make_recipe: Callable
) -> None:
    folder = with_table(large, tmp_path / "changed", flip_label(5))
    with pytest.raises(DataError, match="its checksum is not that of"):
        open_sources(make_recipe(folder))


@pytest.mark.parametrize("column", ["key", "keyframes", "crc32", "extension"])
def test_no_column_goes_unchecked(column: str, large: Path, tmp_path: Path, lazily: None) -> None:
    needles = {
        "key": b"key-20000key-20001",
        "keyframes": np.array([0, 1, 0, 4, 0, 0], np.uint32).tobytes(),
        "crc32": np.arange(20_000, 20_004, dtype=np.uint32).tobytes(),
        "extension": b"mp4jpgjpgmp4",
    }

    def change(data: bytearray) -> None:
        place = bytes(data).index(needles[column])
        data[place] ^= 1

    manifest = Manifest.open(with_table(large, tmp_path / "changed", change))
    changed = 0
    for row in (0, BLOCK_ROWS, 2 * BLOCK_ROWS):
        try:
            manifest.sample(row)
        except DataError:
            changed += 1
    assert changed == 1


def test_what_one_process_has_checked_its_forks_know(large: Path, lazily: None) -> None:
    manifest = Manifest.open(large)
    sums = manifest._sums
    assert sums is not None
    child = os.fork()
    if child == 0:
        manifest.sample(BLOCK_ROWS)
        os._exit(0)
    os.waitpid(child, 0)
    assert list(sums._good) == [b"\0", b"\1", b"\0"]


def test_selection_and_plan_are_those_of_a_scan(large: Path, tmp_path: Path, make_recipe: Callable) -> None:
    old = with_table(large, tmp_path / "old", lambda data: None)
    content = json.loads((large / MANIFEST_NAME).read_text())
    del content["samples"]["blocks"]
    (old / MANIFEST_NAME).unlink()
    (old / MANIFEST_NAME).write_text(manifest_text(content))
    scanned, quick = open_sources(make_recipe(old)), open_sources(make_recipe(large))
    for name, opened in quick.items():
        assert isinstance(opened.selection, Selection)
        assert isinstance(scanned[name].selection, np.ndarray)
        assert opened.selection.tolist() == scanned[name].selection.tolist()
        assert len(opened) == len(scanned[name])
        summary = opened.manifest.summaries[name]
        shards = scanned[name].manifest.column("shard")[scanned[name].selection]
        assert summary.shards.tolist() == np.bincount(shards).tolist()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_places_are_looked_up_right_for_any_blocks(datasets: list[int], rows: int, data: Any) -> None:
    column = np.array(datasets, np.uint16)
    number = data.draw(st.sampled_from(sorted(set(datasets))))
    expected = np.flatnonzero(column == number)
    counts = np.bincount(expected // rows, minlength=-(-len(column) // rows)).astype(np.int64)
    touched: set[int] = set()
    summary = Summary(np.array([len(expected)]), counts, (0, 0), 1, 0)
    selection = Selection(column, number, summary, rows, touched.add)
    assert [selection[index] for index in range(len(expected))] == expected.tolist()
    assert selection[np.arange(len(expected))].tolist() == np.asarray(selection).tolist()
    assert len(selection) == len(expected)
    assert touched <= set(range(0, len(column), rows))
    with pytest.raises(IndexError):
        selection[len(expected)]


@pytest.mark.parametrize(
    "blocks",
    [{}, {"rows": 5}, {"rows": BLOCK_ROWS, "blake2b": "00", "datasets": {}}, {"rows": 0, "blake2b": "zz"}, 7],
)
def test_malformed_blocks_are_errors_for_people(blocks: Any, large: Path, tmp_path: Path) -> None:
    folder = with_table(large, tmp_path / "changed", lambda data: None)
    content = json.loads((large / MANIFEST_NAME).read_text())
    content["samples"]["blocks"] = blocks or {"datasets": {"moves": {}}}
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).write_text(manifest_text(content))
    with pytest.raises(DataError, match="the entry `blocks` is malformed"):
        Manifest.open(folder)
