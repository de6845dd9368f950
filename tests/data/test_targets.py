"""Labels beyond one class in the manifest: kept, counted, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.inspecting import inspect_shards, inspection_text
from data_tools.verify import verify
from framework.data.manifest import MANIFEST_NAME, DatasetInfo, HeadInfo, Manifest, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.errors import DataError
from framework.files import hash_file

HEADS = (HeadInfo("verb", ("take", "put")), HeadInfo("noun", ("cup", "lid", "pan")))
DATASETS = (
    DatasetInfo("homes", "train", "video", ("sit", "stand", "read"), 2, "multi"),
    DatasetInfo("kitchens", "train", "video", (), 2, "heads", HEADS),
    DatasetInfo("photos", "train", "image", ("cat",), 1),
)
TARGETS = [[0, 2], [], [1, 2], [0, -1], []]


def write(folder: Path, targets: list[list[int]] | None = None, **changes: Any) -> Manifest:
    """Two samples of each of the first data sets, and one of the last, in one shard."""
    (folder / "shard-000000.tar").write_bytes(bytes(10240))
    shard = ShardInfo("shard-000000.tar", 10240, hash_file(folder / "shard-000000.tar"), 5)
    columns: dict[str, Any] = {
        "key": [f"sample/{number}" for number in range(5)],
        "shard": [0] * 5,
        "offset": [512, 1024, 2048, 4096, 8192],
        "length": [100] * 5,
        "crc32": [1] * 5,
        "dataset": [0, 0, 1, 1, 2],
        "kind": [1, 1, 1, 1, 0],
        "label": [-1, -1, -1, -1, 0],
        "width": [320] * 5,
        "height": [240] * 5,
        "frames": [10, 10, 10, 10, 1],
        "fps": [10, 10, 10, 10, 0],
        "keyframes": [[0]] * 4 + [[]],
        "extension": ["mp4"] * 4 + ["jpg"],
        "targets": TARGETS if targets is None else targets,
        **changes,
    }
    write_manifest(folder, columns, [shard], DATASETS)
    return Manifest.open(folder)


def test_targets_come_back_with_their_classes(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    assert manifest.datasets == DATASETS
    assert [list(manifest.sample(index).targets) for index in range(5)] == TARGETS
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["version"] == 2
    entries = {
        entry["name"]: entry for entry in json.loads((tmp_path / MANIFEST_NAME).read_text())["datasets"]
    }
    assert entries["homes"]["target"] == "multi"
    assert entries["kitchens"]["heads"][1] == {"name": "noun", "classes": ["cup", "lid", "pan"]}
    assert not {"target", "heads"} & set(entries["photos"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": [[0, 3], [], [1, 2], [0, 0], []]}, "'homes' is outside its classes"),
        ({"targets": [[2, 0], [], [1, 2], [0, 0], []]}, "'homes' do not ascend"),
        ({"targets": [[1, 1], [], [1, 2], [0, 0], []]}, "'homes' do not ascend"),
        ({"targets": [[0], [], [1], [0, 0], []]}, "'kitchens' has not one target for each"),
        ({"targets": [[0], [], [2, 0], [0, 0], []]}, "'kitchens' is outside its head's classes"),
        ({"targets": [[0], [], [1, 2], [0, 0], [0]]}, "'photos' has one label for each sample, but"),
        ({"label": [0, -1, -1, -1, 0]}, "a label is outside"),
    ],
)
def test_targets_that_contradict_their_data_set(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        write(tmp_path, **changes)


def test_what_is_in_them_is_counted_and_checked(tmp_path: Path) -> None:
    write(tmp_path)
    homes, kitchens, photos = inspect_shards(tmp_path)["datasets"]
    assert homes["classes"] == {"sit": 1, "stand": 0, "read": 1}
    assert (homes["target"], homes["unlabelled"], homes["labels"]["max"]) == ("multi", 1, 2)
    assert kitchens["heads"] == {"verb": {"take": 1, "put": 1}, "noun": {"cup": 0, "lid": 0, "pan": 1}}
    assert kitchens["unlabelled"] == 1
    assert "target" not in photos
    text = inspection_text(inspect_shards(tmp_path))
    for words in ("none of stand", "labels", "verb", "none of cup, lid"):
        assert words in text
    # the tar is empty here, so its samples are wrong; the table itself is not
    assert not [problem for problem in verify(tmp_path).problems if problem.file == "samples.arrow"]


def test_a_data_set_has_classes_or_heads() -> None:
    for target, classes, heads in (("heads", (), ()), ("single", (), HEADS), ("heads", ("a",), HEADS)):
        with pytest.raises(ValueError, match="heads"):
            DatasetInfo("both", "train", "video", classes, 1, target, heads)  # type: ignore[arg-type]
