"""Class folders, on disk or inside an archive, become shards that nothing in a file name can upset."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.items import Collection, Entry, inventory
from data_tools.readers import MemberReader
from framework.data.manifest import Manifest


def by_source(folder: Path) -> dict[str, Any]:
    """{original relative path: its KEY.json together with the manifest's sample}."""
    manifest = Manifest.open(folder)
    samples = {}
    for index in range(len(manifest)):
        sample = manifest.sample(index)
        with tarfile.open(folder / sample.shard) as archive:
            about = json.load(archive.extractfile(f"{sample.key}.json"))  # type: ignore[arg-type]
        samples[about["source"]] = {**about, "sample": sample}
    return samples


def test_names_of_all_kinds_survive(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    names = [
        "tench, Tinca tinca/n01440764.v1.final.JPEG",
        "größe/übung ✓.png",
        "größe/ubung.png",
        "cat/0000.jpg",
        "dog/0000.jpg",
        "dog/deep/er/0000.jpg",
        "dog/a.jpg",
        "dog/a.png",
        "dog/A.jpg",
        f"dog/{'long' * 50}.jpg",
    ]
    root = class_folders({name: make_image(seed=number) for number, name in enumerate(names)})
    out = tmp_path / "shards"
    done = tubeworks("shard", "folder", "--input", root, "--name", "photos", "--out", out, "--json")
    assert done.code == 0
    assert (done.json["written"], done.json["failed"]) == (len(names), [])
    found = by_source(out)
    assert found.keys() == set(names)
    classes = Manifest.open(out).datasets[0].classes
    assert classes == ("cat", "dog", "größe", "tench, Tinca tinca")
    for name, about in found.items():
        sample = about["sample"]
        assert about["class"] == classes[sample.label] == name.split("/")[0]
        assert re.fullmatch(r"photos/[A-Za-z0-9_-]{1,100}", sample.key)
        payload = (out / sample.shard).read_bytes()[sample.offset : sample.offset + sample.length]
        assert payload == (root / name).read_bytes()
    assert len({about["sample"].key.lower() for about in found.values()}) == len(names)
    assert found["cat/0000.jpg"]["sample"].key == "photos/cat-0000"


def test_file_names_that_are_no_text(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    root = class_folders({"cat/good.jpg": make_image()})
    with open(os.path.join(os.fsencode(root), b"cat", b"latin-\xe9.jpg"), "wb") as file:
        file.write(make_image(seed=1))
    out = tmp_path / "shards"
    assert tubeworks("shard", "folder", "--input", root, "--out", out, "--json").json["written"] == 2
    assert by_source(out).keys() == {"cat/good.jpg", "cat/latin-\\xe9.jpg"}


def test_what_is_no_sample_is_named(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    make_video: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    whole = make_image((100, 100))
    root = class_folders(
        {
            "cat/good.jpg": whole,
            "cat/half.jpg": whole[: len(whole) // 2],
            "cat/empty.jpg": b"",
            "cat/page.jpg": b"<html>gone</html>",
            "cat/notes.txt": b"my notes",
            "cat/Thumbs": b"what",
            "cat/._good.jpg": b"resource fork",
            "README.md": b"read me",
            "dog/only.jpg": b"",
        }
    )
    (root / "cat" / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    (root / "cat" / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(root / "cat" / "pipe.jpg")
    out = tmp_path / "shards"
    done = tubeworks("shard", "folder", "--input", root, "--name", "pets", "--out", out, "--json")
    assert done.code == 0
    assert done.json["written"] == 1
    reasons = {failure["key"]: failure["reason"] for failure in done.json["failed"]}
    expected = {
        "pets/cat-half": "truncated",
        "pets/cat-empty": "empty file",
        "pets/cat-page": "a web page instead of an image",
        "pets/cat/notes.txt": "not media",
        "pets/cat/Thumbs": "not media",
        "pets/cat/._good.jpg": "hidden",
        "pets/README.md": "outside the class folders",
        "pets/dog-only": "empty file",
        "pets/cat/dangling.jpg": "cannot be read",
        "pets/cat/endless.jpg": "not a regular file",
        "pets/cat/pipe.jpg": "not a regular file",
    }
    assert reasons.keys() == expected.keys()
    for key, reason in expected.items():
        assert reason in reasons[key]
    assert Manifest.open(out).datasets[0].classes == ("cat", "dog"), "labels must not depend on damage"


def test_folders_of_videos(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_video: Callable[..., bytes],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    root = class_folders({"a/x.mp4": make_video(5), "b/y.webm": make_video(6, container="matroska")})
    out = tmp_path / "shards"
    assert tubeworks("shard", "folder", "--input", root, "--out", out).code == 0
    assert Manifest.open(out).datasets[0].kind == "video"
    class_folders({"b/poster.jpg": make_image()})
    done = tubeworks("shard", "folder", "--input", root, "--out", tmp_path / "both")
    assert done.code == 3
    assert "1 images and 2 videos" in done.stderr
    done = tubeworks(
        "shard", "folder", "--input", root, "--out", tmp_path / "both", "--kind", "video", "--json"
    )
    assert done.json["written"] == 2
    assert [failure["key"] for failure in done.json["failed"]] == ["folders/b/poster.jpg"]


def test_several_inputs_become_mixed_shards(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_video: Callable[..., bytes],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    clips = class_folders({f"run/{i}.mp4": make_video(4, seed=i) for i in range(6)}, "clips")
    photos = class_folders({f"cat/{i}.jpg": make_image(seed=i) for i in range(6)}, "photos")
    more = class_folders({f"dog/{i}.jpg": make_image(seed=10 + i) for i in range(6)}, "more")
    out = tmp_path / "shards"
    done = tubeworks(
        "shard", "folder", "--input", clips, "--input", photos, "--input", more,
        "--name", "clips", "--name", "photos", "--name", "photos", "--out", out, "--shard-samples", 9,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    manifest = Manifest.open(out)
    assert [(d.name, d.kind, d.samples) for d in manifest.datasets] == [
        ("clips", "video", 6),
        ("photos", "image", 12),
    ]
    assert manifest.datasets[1].classes == ("cat", "dog")
    for shard in range(len(manifest.shards)):
        chosen = manifest.column("dataset")[manifest.column("shard") == shard]
        assert set(chosen.tolist()) == {0, 1}, "every shard holds both kinds"


def test_a_folder_without_anything_usable_ends_with_an_error(
    tubeworks: Callable[..., Any], class_folders: Callable[..., Path], tmp_path: Path
) -> None:
    root = class_folders({"cat/empty.jpg": b""})
    done = tubeworks("shard", "folder", "--input", root, "--out", tmp_path / "shards", "--json")
    assert done.code == 3
    assert done.json["written"] == 0
    assert len(done.json["failed"]) == 1
    assert "nothing was written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folders"]

    done = tubeworks("shard", "folder", "--input", tmp_path / "nowhere", "--out", tmp_path / "shards")
    assert done.code == 3
    assert "no such folder or archive" in done.stderr


def test_links_are_followed_but_not_in_circles(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    elsewhere = class_folders({"x.jpg": make_image()}, "elsewhere")
    root = class_folders({"cat/y.jpg": make_image(seed=1)})
    (root / "dog").symlink_to(elsewhere, target_is_directory=True)
    (root / "cat" / "loop").symlink_to(root, target_is_directory=True)
    out = tmp_path / "shards"
    assert tubeworks("shard", "folder", "--input", root, "--out", out, "--json").json["written"] == 2
    assert by_source(out).keys() == {"cat/y.jpg", "dog/x.jpg"}


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def archive_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def test_an_archive_is_read_in_place(
    tubeworks: Callable[..., Any], make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    names = ["train/cat/ä 1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", f"train/dog/{'x' * 120}.jpg"]
    pictures = {f"./set/{name}": make_image(seed=number) for number, name in enumerate(names)}
    path = archive_of(tmp_path / "set.tar", [member(name, data) for name, data in pictures.items()])
    out = tmp_path / "shards"
    done = tubeworks("shard", "folder", "--input", path / "set" / "train", "--out", out, "--json")
    assert done.code == 0, done.stderr
    assert done.json["written"] == 3
    found = by_source(out)
    assert found.keys() == {"cat/ä 1.jpg", "dog/1.jpg", f"dog/{'x' * 120}.jpg"}
    for name, about in found.items():
        sample = about["sample"]
        payload = (out / sample.shard).read_bytes()[sample.offset : sample.offset + sample.length]
        assert payload == pictures[f"./set/train/{name}"]


def test_members_that_lead_out_of_an_archive_are_refused(
    tubeworks: Callable[..., Any], make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(make_image(seed=7))
    path = archive_of(
        tmp_path / "evil.tar",
        [
            member("cat/good.jpg", make_image()),
            member("cat/../../climb.jpg", make_image()),
            member("/cat/absolute.jpg", make_image()),
            member("cat/soft.jpg", kind=tarfile.SYMTYPE, link=str(secret)),
            member("cat/hard.jpg", kind=tarfile.LNKTYPE, link="../secret.jpg"),
            member("cat/pipe.jpg", kind=tarfile.FIFOTYPE),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "shards"
    done = tubeworks("shard", "folder", "--input", path, "--name", "evil", "--out", out, "--json")
    assert done.code == 0
    assert done.json["written"] == 1
    reasons = {failure["key"]: failure["reason"] for failure in done.json["failed"]}
    assert reasons.keys() == {
        "evil/cat/../../climb.jpg", "evil//cat/absolute.jpg", "evil/cat/soft.jpg", "evil/cat/hard.jpg",
        "evil/cat/pipe.jpg",
    }  # fmt: skip
    assert all(reason.startswith("refused") for reason in reasons.values())
    assert secret.read_bytes() not in (out / "shard-000000.tar").read_bytes()
    assert sorted(p for p in tmp_path.rglob("*") if out not in (p, *p.parents)) == before, (
        "nothing was unpacked"
    )


@pytest.mark.parametrize("case", ["compressed", "truncated", "no archive"])
def test_archives_that_cannot_be_read(
    tubeworks: Callable[..., Any], make_image: Callable[..., bytes], tmp_path: Path, case: str
) -> None:
    members = [member(f"cat/{i}.jpg", make_image((200, 200), seed=i)) for i in range(3)]
    path = archive_of(tmp_path / "set.tar", members, "w:gz" if case == "compressed" else "w")
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:30000])
    if case == "no archive":
        path.write_bytes(b"no tar at all" * 100)
    done = tubeworks("shard", "folder", "--input", path, "--out", tmp_path / "shards")
    assert done.code == 3
    assert "cannot be read as an uncompressed tar archive" in done.stderr


def test_held_out_folders_get_the_labels_of_the_training_shards(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    train = class_folders({f"{name}/1.jpg": make_image() for name in ("ant", "bee", "cat")}, "train")
    held_out = class_folders({f"{name}/2.jpg": make_image(seed=1) for name in ("bee", "cat")}, "held_out")
    common = ("shard", "folder", "--name", "pets", "--input")
    assert tubeworks(*common, train, "--out", tmp_path / "a").code == 0
    done = tubeworks(
        *common, held_out, "--split", "val", "--classes", tmp_path / "a", "--out", tmp_path / "b"
    )
    assert done.code == 0
    manifest = Manifest.open(tmp_path / "b")
    assert manifest.datasets[0].classes == ("ant", "bee", "cat")
    assert sorted(manifest.column("label").tolist()) == [1, 2]
    class_folders({"dog/3.jpg": make_image(seed=2)}, "held_out")
    done = tubeworks(*common, held_out, "--classes", tmp_path / "a", "--out", tmp_path / "c")
    assert done.code == 3
    assert "not in the list of classes: dog" in done.stderr


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=120)


@given(st.sets(st.tuples(names, names), min_size=1, max_size=20))
def test_keys_are_safe_and_unique_whatever_files_are_called(files: set[tuple[str, str]]) -> None:
    entries = [
        Entry(f"{folder}/{name}", f"{folder}/{name}", folder, MemberReader("a.tar", 0, 0, 0))
        for folder, name in sorted(files)
    ]
    classes = tuple(sorted({folder for folder, _ in files}))
    found = inventory([Collection("set", "train", "image", classes, entries)])
    keys = [item.key for item in found.items]
    assert all(re.fullmatch(r"set/[A-Za-z0-9_-]{1,95}", key) for key in keys)
    assert len({key.lower() for key in keys}) == len(files)
    assert keys == sorted(keys)
    for item in found.items:
        assert item.class_name == found.datasets[0].classes[item.label]
