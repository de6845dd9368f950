"""The manifest keeps what was written, refuses what is damaged, and says what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest

from framework.data.manifest import (
    MANIFEST_NAME,
    SAMPLES_NAME,
    VERSION,
    DatasetInfo,
    Manifest,
    ShardInfo,
)
from framework.data.manifest_file import manifest_text
from framework.data.manifest_writer import write_manifest
from framework.errors import DataError
from framework.files import hash_file, replace_file

DATASETS = (
    DatasetInfo("clips", "train", "video", ("arm wrestling", "größe"), 3),
    DatasetInfo("photos", "train", "image", ("cat",), 2),
)


def columns(**changes: Any) -> dict[str, Any]:
    """Five samples in two shards."""
    rows: dict[str, Any] = {
        "key": ["clips/a", "photos/b", "clips/c", "photos/d", "clips/e"],
        "shard": [0, 0, 0, 1, 1],
        "offset": [512, 2048, 4096, 512, 2048],
        "length": [100, 200, 300, 400, 500],
        "crc32": [1, 2**32 - 1, 3, 4, 5],
        "dataset": [0, 1, 0, 1, 0],
        "kind": [1, 0, 1, 0, 1],
        "label": [0, 0, 1, 0, -1],
        "width": [320] * 5,
        "height": [240] * 5,
        "frames": [75, 1, 64, 1, 300],
        "fps": [29.97, 0, 25, 0, 30],
        "keyframes": [[0, 30, 60], [], [0], [], [0, 250]],
        "extension": ["mp4", "jpg", "mkv", "png", "mp4"],
    }
    return {**rows, **changes}


def shards_in(folder: Path) -> list[ShardInfo]:
    shards = []
    for name, size, samples in (("shard-000000.tar", 10240, 3), ("shard-000001.tar", 20480, 2)):
        (folder / name).write_bytes(bytes(size))
        shards.append(ShardInfo(name, size, hash_file(folder / name), samples))
    return shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_manifest(tmp_path, columns(), shards_in(tmp_path), DATASETS)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(manifest_text({**json.loads(path.read_text()), **changes}))


def test_everything_written_comes_back(folder: Path) -> None:
    manifest = Manifest.open(folder)
    assert len(manifest) == 5
    assert manifest.datasets == DATASETS
    assert [shard.name for shard in manifest.shards] == ["shard-000000.tar", "shard-000001.tar"]
    for name, expected in columns().items():
        if name == "keyframes":
            assert [manifest.keyframes(index).tolist() for index in range(5)] == expected
        else:
            numpy.testing.assert_array_equal(
                manifest.column(name), numpy.array(expected, manifest.column(name).dtype)
            )
    sample = manifest.sample(4)
    assert (sample.key, sample.shard, sample.dataset, sample.kind) == (
        "clips/e",
        "shard-000001.tar",
        "clips",
        "video",
    )
    assert (sample.offset, sample.length, sample.crc32, sample.label, sample.frames) == (
        2048,
        500,
        5,
        -1,
        300,
    )
    assert sample.keyframes.tolist() == [0, 250]
    assert sample.fps == 30


def test_every_byte_of_a_manifest_is_under_its_checksum(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    whole = path.read_bytes()
    assert Manifest.open(folder).has_checksum
    for place in range(len(whole)):
        for bit in (0, 5) if place % 8 else range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(DataError, match=r"manifest\.json: "):
                Manifest.open(folder)
    name = "größe".encode()
    for changed in (
        whole.replace(name, b"gr\xc3\xb6sse"),
        whole + b" ",
        whole[:-1],
        whole.rstrip(b"}\n") + b"}",
    ):
        path.write_bytes(changed)
        with pytest.raises(DataError, match="its checksum is not that of what it says"):
            Manifest.open(folder)
    path.write_bytes(whole)
    assert Manifest.open(folder).datasets == DATASETS


def test_a_manifest_of_an_earlier_version_has_no_checksum(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content["blake2b"]
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    assert not Manifest.open(folder).has_checksum
    path.write_text(json.dumps({**content, "blake2c": "0" * 32}))
    with pytest.raises(DataError, match="its checksum is not that of what it says"):
        Manifest.open(folder)


def test_equal_arguments_give_equal_bytes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_manifest(other, columns(), shards_in(other), DATASETS)
    for name in (MANIFEST_NAME, SAMPLES_NAME):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_columns_are_views_of_the_file_and_cannot_be_written(folder: Path) -> None:
    manifest = Manifest.open(folder)
    offsets = manifest.column("offset")
    assert not offsets.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        offsets[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        manifest.keyframes(0)[0] = 1


def test_hash_follows_the_content(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    same, other = tmp_path_factory.mktemp("same"), tmp_path_factory.mktemp("other")
    write_manifest(same, columns(), shards_in(same), DATASETS)
    write_manifest(other, columns(crc32=[1, 2, 3, 4, 6]), shards_in(other), DATASETS)
    assert Manifest.open(same).hash == Manifest.open(folder).hash != Manifest.open(other).hash
    assert (same / SAMPLES_NAME).read_bytes() == (folder / SAMPLES_NAME).read_bytes()


def test_travels_to_another_process(folder: Path) -> None:
    manifest = Manifest.open(folder)
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy.hash == manifest.hash
    assert copy.sample(2).key == "clips/c"


@pytest.mark.parametrize("index", [-1, 5])
def test_no_sample_outside_the_manifest(folder: Path, index: int) -> None:
    with pytest.raises(IndexError):
        Manifest.open(folder).sample(index)


def test_select_by_name_by_source_and_by_kind(folder: Path) -> None:
    manifest = Manifest.open(folder)
    assert manifest.select("clips", "anything", "video").tolist() == [0, 2, 4]
    assert manifest.select(None, "photos", "image").tolist() == [1, 3]
    selection = manifest.select(None, "unheard_of", "video")
    assert selection.tolist() == [0, 2, 4]
    assert selection.dtype == numpy.int64


@pytest.mark.parametrize(
    ("dataset", "default", "kind"),
    [("nothing", "clips", "video"), ("clips", "x", "image"), (None, "photos", "video")],
)
def test_select_lists_what_there_is(folder: Path, dataset: str | None, default: str, kind: Any) -> None:
    with pytest.raises(DataError, match=r"clips \(video, 3 samples\), photos \(image, 2 samples\)"):
        Manifest.open(folder).select(dataset, default, kind)


def test_select_does_not_guess_between_two(tmp_path: Path) -> None:
    datasets = (
        DatasetInfo("one", "train", "video", ("a",), 3),
        DatasetInfo("two", "train", "video", ("a",), 2),
    )
    rows = columns(kind=[1] * 5, label=[0] * 5)
    write_manifest(tmp_path, rows, shards_in(tmp_path), datasets)
    with pytest.raises(DataError, match="say which with `dataset:`"):
        Manifest.open(tmp_path).select(None, "k400", "video")


def test_later_version_asks_for_an_upgrade(folder: Path) -> None:
    edit(folder, version=VERSION + 1)
    with pytest.raises(DataError, match=rf"version {VERSION + 1}.*upgrade tubeworks"):
        Manifest.open(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards missing: shard-000001\.tar; copy them again"):
        Manifest.open(folder)


def test_short_shard_is_named(folder: Path) -> None:
    (folder / "shard-000000.tar").write_bytes(bytes(10000))
    with pytest.raises(DataError, match=r"shard-000000\.tar \(10000 bytes instead of 10240\)"):
        Manifest.open(folder)


def test_damaged_or_foreign_files_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        Manifest.open(folder / "nowhere")
    table = (folder / SAMPLES_NAME).read_bytes()
    (folder / SAMPLES_NAME).write_bytes(table[:-8])
    with pytest.raises(DataError, match=r"samples\.arrow.*bytes instead of"):
        Manifest.open(folder)
    (folder / SAMPLES_NAME).write_bytes(bytes(len(table)))
    with pytest.raises(DataError, match=r"samples\.arrow: cannot be read"):
        Manifest.open(folder)
    (folder / SAMPLES_NAME).unlink()
    with pytest.raises(DataError, match=r"samples\.arrow: missing"):
        Manifest.open(folder)
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Manifest.open(folder)
    (folder / MANIFEST_NAME).write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match="not JSON"):
        Manifest.open(folder)
    (folder / MANIFEST_NAME).write_text("[]")
    with pytest.raises(DataError, match="not a manifest of shards"):
        Manifest.open(folder)
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match="not a folder of shards"):
        Manifest.open(folder)


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd", "..", ""])
def test_a_shard_cannot_lie_outside_its_folder(folder: Path, name: str) -> None:
    shards = json.loads((folder / MANIFEST_NAME).read_text())["shards"]
    edit(folder, shards=[{**shards[0], "name": name}, shards[1]])
    with pytest.raises(DataError, match="is not the name of a file beside it"):
        Manifest.open(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": [{"name": "shard-000000.tar"}]},
        {"datasets": [{"name": "a", "split": "train", "kind": "sound", "classes": [], "samples": 5}]},
        {"datasets": 3},
        {"samples": {}},
        {"version": "one"},
        {"version": 0},
    ],
)
def test_malformed_manifests_are_errors_for_people(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(DataError):
        Manifest.open(folder)


def test_table_and_shards_of_different_sets_do_not_open(folder: Path) -> None:
    shards = json.loads((folder / MANIFEST_NAME).read_text())["shards"]
    edit(folder, shards=[{**shards[0], "samples": 7}, shards[1]])
    with pytest.raises(DataError, match="do not belong together"):
        Manifest.open(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shard": [0, 0, 1, 1, 1]}, "sample counts"),
        ({"dataset": [0, 1, 0, 0, 0]}, "sample counts"),
        ({"offset": [512, 100, 4096, 512, 2048]}, "not ordered"),
        ({"length": [100, 200, 30000, 400, 500]}, "outside its shard"),
        ({"label": [0, 0, 2, 0, 0]}, "label"),
        ({"label": [0, 0, -2, 0, 0]}, "label"),
        ({"kind": [1, 1, 1, 0, 1]}, "kind"),
    ],
)
def test_the_writer_refuses_contradictions(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        write_manifest(tmp_path, columns(**changes), shards_in(tmp_path), DATASETS)
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_the_writer_refuses_other_columns(tmp_path: Path) -> None:
    rows = columns()
    rows["name"] = rows.pop("key")
    with pytest.raises(DataError, match=r"\['key', 'name'\]"):
        write_manifest(tmp_path, rows, shards_in(tmp_path), DATASETS)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"is a file; give the folder that holds manifest\.json"):
        Manifest.open(tmp_path / "file")
    with pytest.raises(DataError, match="cannot be read"):
        Manifest.open("n" * 300)
