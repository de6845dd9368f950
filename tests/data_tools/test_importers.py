"""Official layouts become shards with the official labels; what a list names and is not there is said."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy
import pytest

from framework.data.manifest import Manifest

Shards = Callable[..., Any]


def counting_video(frames: int, fps: int = 10, size: tuple[int, int] = (64, 48)) -> bytes:
    """A video whose n-th frame has brightness 20 + 4 n: each frame tells its number."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("libx264", rate=fps, options={"g": "7", "crf": "1", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            grey = numpy.full((size[1] * 3 // 2, size[0]), 128, numpy.uint8)
            grey[: size[1]] = 20 + 4 * number
            output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="yuv420p")))
        output.mux(stream.encode())
    return buffer.getvalue()


def numbers_of(data: bytes) -> list[int]:
    """The numbers of the frames in a clip cut from `counting_video`."""
    with av.open(io.BytesIO(data)) as container:
        lumas = [
            frame.to_ndarray(format="yuv420p")[: frame.height].mean() for frame in container.decode(video=0)
        ]
    return [round((luma - 20) / 4) for luma in lumas]


def payload(folder: Path, sample: Any) -> bytes:
    return (folder / sample.shard).read_bytes()[sample.offset : sample.offset + sample.length]


def about(folder: Path, sample: Any) -> dict[str, Any]:
    with tarfile.open(folder / sample.shard) as archive:
        return json.load(archive.extractfile(f"{sample.key}.json"))  # type: ignore[arg-type]


def samples(folder: Path) -> dict[str, Any]:
    manifest = Manifest.open(folder)
    return {s.key.split("/")[1]: s for s in map(manifest.sample, range(len(manifest)))}


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def test_something_something(tubeworks: Shards, make_video: Callable[..., bytes], tmp_path: Path) -> None:
    webm = make_video(6, container="webm", codec="libvpx")
    root = write(tmp_path / "videos", {"1.webm": webm, "2.webm": webm, "9.webm": webm})
    rows = [
        {
            "id": "1",
            "label": "holding potato next to box",
            "template": "Holding [something] next to [something]",
            "placeholders": ["potato", "box"],
        },
        {"id": "2", "label": "closing book", "template": "Closing [something]", "placeholders": ["book"]},
        {"id": "3", "label": "closing door", "template": "Closing [something]", "placeholders": ["door"]},
    ]
    classes = {"Opening something": "0", "Holding something next to something": "2", "Closing something": "1"}
    lists = write(
        tmp_path,
        {"train.json": json.dumps(rows), "labels.json": json.dumps(classes), "test.json": '[{"id": "9"}]'},
    )
    arguments = ("shard", "ssv2", "--videos", root, "--classes", lists / "labels.json")
    done = tubeworks(*arguments, "--annotations", lists / "train.json", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    assert done.json["missing"] == ["3.mp4"]
    made = samples(tmp_path / "out")
    assert (made["1"].label, made["2"].label, made["1"].extension) == (2, 1, "webm")
    assert payload(tmp_path / "out", made["1"]) == webm, "archive keeps every byte"
    told = about(tmp_path / "out", made["1"])
    assert (told["text"], told["placeholders"]) == ("holding potato next to box", ["potato", "box"])
    names = (tmp_path / "out" / "ssv2.classes.txt").read_text().splitlines()
    assert names == ["Opening something", "Closing something", "Holding something next to something"]
    done = tubeworks(
        *arguments, "--annotations", lists / "test.json", "--split", "test", "--out", tmp_path / "t"
    )
    assert done.code == 0, done.stderr
    assert samples(tmp_path / "t")["9"].label == -1


CHARADES = (
    'id,subject,actions,length\nAAAAA,S1,"c001 0.50 1.50;c002 0.90 2.00",3.0\nBBBBB,S2,,3.0\nCCCCC,S3,,1\n'
)


def test_charades_is_multi_label_and_can_be_cut(tubeworks: Shards, tmp_path: Path) -> None:
    root = write(tmp_path / "videos", {"AAAAA.mkv": counting_video(30), "x/BBBBB.mkv": counting_video(10)})
    lists = write(tmp_path, {"train.csv": CHARADES, "classes.txt": "c000 Sit\nc001 Hold\nc002 Laugh\n"})
    arguments = (
        "shard", "charades", "--videos", root, "--annotations", lists / "train.csv",
        "--classes", lists / "classes.txt", "--json",
    )  # fmt: skip
    done = tubeworks(*arguments, "--out", tmp_path / "whole")
    assert done.code == 0, done.stderr
    assert done.json["missing"] == ["CCCCC.mp4"]
    manifest = Manifest.open(tmp_path / "whole")
    assert (manifest.datasets[0].target, manifest.datasets[0].classes) == ("multi", ("Sit", "Hold", "Laugh"))
    told = {key: about(tmp_path / "whole", sample) for key, sample in samples(tmp_path / "whole").items()}
    assert {key: row["targets"] for key, row in told.items()} == {"AAAAA": [1, 2], "BBBBB": []}
    tubeworks("inspect", tmp_path / "whole", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    captions = re.findall("</p><figcaption>([^<]*)|<img [^>]*><figcaption>([^<]*)", page)
    assert sorted(map("".join, captions)) == ["charades/AAAAA Hold, Laugh", "charades/BBBBB "]
    assert told["AAAAA"]["actions"] == [["Hold", 0.5, 1.5], ["Laugh", 0.9, 2.0]]

    refused = tubeworks(*arguments, "--segments", "--out", tmp_path / "cut")
    assert (refused.code, "take --preset balanced" in refused.stderr) == (3, True)
    done = tubeworks(*arguments, "--segments", "--preset", "balanced", "--out", tmp_path / "cut")
    assert done.code == 0, done.stderr
    made = samples(tmp_path / "cut")
    assert numbers_of(payload(tmp_path / "cut", made["AAAAA-000"])) == list(range(5, 15))
    assert numbers_of(payload(tmp_path / "cut", made["AAAAA-001"])) == list(range(9, 20))
    assert about(tmp_path / "cut", made["AAAAA-000"])["targets"] == [1, 2], (
        "Laugh goes on for over half of it"
    )
    assert tubeworks("verify", tmp_path / "cut", "--decode").code == 0


EPIC = """narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,noun_class
P01_01_0,P01,P01_01,00:00:00.00,00:00:01.00,open door,1,0
P01_01_1,P01,P01_01,00:00:02.35,00:00:03.05,take cup,0,2
P01_01_2,P01,P01_01,00:00:07.00,00:00:09.00,take cup,0,2
P01_02_0,P01,P01_02,00:00:00.00,00:00:01.00,take cup,0,2
"""


def test_epic_kitchens_has_clips_of_its_segments_with_verb_and_noun(
    tubeworks: Shards, tmp_path: Path
) -> None:
    """No frame outside a segment can be sampled, because none is in the shards."""
    root = write(tmp_path / "epic", {"P01/videos/P01_01.mkv": counting_video(50)})
    lists = write(
        tmp_path,
        {
            "train.csv": EPIC,
            "verbs.csv": "id,key,instances\n0,take,\"['take']\"\n1,open,\"['open']\"\n",
            "nouns.csv": "id,key,instances\n0,door,x\n1,pan,x\n2,cup,x\n",
        },
    )
    out = tmp_path / "out"
    done = tubeworks(
        "shard", "epic", "--videos", root, "--annotations", lists / "train.csv", "--out", out, "--json",
        "--verbs", lists / "verbs.csv", "--nouns", lists / "nouns.csv", "--preset", "fast",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.json["missing"] == ["P01_02.mp4"]
    [failed] = done.json["failed"]
    assert failed["key"] == "epic/P01_01_2"
    assert "no frame between 7.000 and 9.000 s; the video is 5.00 s long" in failed["reason"]
    dataset = Manifest.open(out).datasets[0]
    assert [(head.name, head.classes) for head in dataset.heads] == [
        ("verb", ("take", "open")),
        ("noun", ("door", "pan", "cup")),
    ]
    made = samples(out)
    assert numbers_of(payload(out, made["P01_01_0"])) == list(range(10))
    assert numbers_of(payload(out, made["P01_01_1"])) == list(range(24, 31))
    told = about(out, made["P01_01_1"])
    assert (told["targets"], told["text"], told["segment"]) == ([0, 2], "take cup", [2.35, 3.05])
    assert (out / "epic.noun.classes.txt").read_text() == "door\npan\ncup\n"
    tubeworks("inspect", out, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "take, cup</figcaption>" in page
    assert all(f"<figcaption>{head}: all</figcaption>" in page for head in ("verb", "noun"))


def test_moments_in_time(tubeworks: Shards, make_video: Callable[..., bytes], tmp_path: Path) -> None:
    root = write(tmp_path / "videos", {"adult+singing/a.mp4": make_video(5), "cook/b-1.mp4": make_video(6)})
    rows = "adult+singing/a.mp4,adult+singing,10,1\ncook/b-1.mp4,cook,3,0\ncook/gone.mp4,cook,3,0\n"
    lists = write(tmp_path, {"train.csv": rows, "categories.txt": "cook,0\nadult+singing,1\n"})
    done = tubeworks(
        "shard", "moments", "--videos", root, "--annotations", lists / "train.csv", "--json",
        "--classes", lists / "categories.txt", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.json["missing"] == ["cook/gone.mp4"]
    labels = {about(tmp_path / "out", s)["source"]: s.label for s in samples(tmp_path / "out").values()}
    assert labels == {"adult+singing/a.mp4": 1, "cook/b-1.mp4": 0}


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("*"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_imagenet_in_its_original_archives_and_in_folders(
    tubeworks: Shards, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    """The tar of tars is read in place and gives the same media as the unpacked folders."""
    pictures = {name: make_image(seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    first = {"n00000002_1.JPEG": pictures["a"], "n00000002_2.JPEG": pictures["b"]}
    second = {"n00000001_1.JPEG": pictures["c"], "n00000001_9.JPEG": b"broken"}
    whole = tar({"n00000002.tar": tar(first), "n00000001.tar": tar(second)})
    folders = {f"n00000002/{name}": data for name, data in first.items()}
    folders |= {f"n00000001/{name}": data for name, data in second.items()}
    root = write(
        tmp_path, {"train.tar": whole, **{f"folders/{name}": data for name, data in folders.items()}}
    )
    made = []
    for number, source in enumerate(("train.tar", "folders")):
        out = tmp_path / f"out{number}"
        done = tubeworks("shard", "imagenet", "--input", root / source, "--out", out, "--json")
        assert done.code == 0, done.stderr
        assert [failure["key"] for failure in done.json["failed"]] == ["in1k/n00000001_9"]
        assert Manifest.open(out).datasets[0].classes == ("n00000001", "n00000002")
        made.append({key: (s.label, payload(out, s)) for key, s in samples(out).items()})
    assert made[0] == made[1]
    assert made[0]["n00000002_2"] == (1, pictures["b"])


def test_flat_validation_images_get_their_classes_from_a_list(
    tubeworks: Shards, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    images = {f"ILSVRC2012_val_0000000{n}.JPEG": make_image(seed=n) for n in (1, 2)}
    rows = ("ILSVRC2012_val_00000002,n00000001 1 2 3 4", "ILSVRC2012_val_00000001,n00000005 1 2 3 4 ")
    kaggle = "\n".join(["ImageId,PredictionString", *rows])
    root = write(tmp_path, {"val.tar": tar(images), "LOC.csv": kaggle, "order.txt": "n00000005\nn00000001\n"})
    for name in ("LOC.csv", "order.txt"):
        out = tmp_path / f"out-{name}"
        done = tubeworks(
            "shard", "imagenet", "--input", root / "val.tar", "--split", "val", "--labels", root / name,
            "--out", out,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        made = samples(out)
        assert (made["ILSVRC2012_val_00000001"].label, made["ILSVRC2012_val_00000002"].label) == (1, 0)
    flat = ("shard", "imagenet", "--input", root / "val.tar", "--split", "val", "--out", tmp_path / "x")
    done = tubeworks(*flat)
    assert (done.code, "flat images need --labels" in done.stderr) == (3, True)
    (root / "LOC.csv").write_text(kaggle.replace(",n00000005 1 2 3 4 ", ""))
    done = tubeworks(*flat, "--labels", root / "LOC.csv")
    assert (done.code, f"{root / 'LOC.csv'}:3: 'ILSVRC2012_val_00000001' is not" in done.stderr) == (3, True)
    done = tubeworks("verify", tmp_path / "out-LOC.csv", "--official", root / "LOC.csv")
    assert (done.code, f"{root / 'LOC.csv'}:3:" in done.stderr) == (3, True)


@pytest.mark.parametrize("form", ["csv", "parquet", "tsv"])
def test_any_table(tubeworks: Shards, make_video: Callable[..., bytes], tmp_path: Path, form: str) -> None:
    from pyarrow import csv, parquet, table

    root = write(tmp_path / "files", {"a.mp4": make_video(5), "deep/007.mp4": make_video(6, seed=1)})
    rows = {
        "file": ["a.mp4", "deep/007.mp4", "gone.mp4", "a.mp4"],
        "tags": ["cat;dog", "dog", "dog", "cat"],
        "part": ["train", "train", "train", "val"],
    }
    path = tmp_path / f"list.{form}"
    if form == "parquet":
        parquet.write_table(table(rows), path)
    else:
        csv.write_csv(table(rows), path, csv.WriteOptions(delimiter="," if form == "csv" else "\t"))
    arguments = ("shard", "table", "--table", path, "--root", root, "--name", "mine", "--path-column", "file")
    done = tubeworks(
        *arguments, "--label-column", "tags", "--label-separator", ";", "--split-column", "part",
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.json["missing"] == ["gone.mp4"]
    told = {s.key: about(tmp_path / "out", s)["targets"] for s in samples(tmp_path / "out").values()}
    assert told == {"mine/a": [0, 1], "mine/deep-007": [1]}
    done = tubeworks(*arguments, "--label-column", "nothing", "--out", tmp_path / "x")
    assert (done.code, "no column nothing; there is file, tags, part" in done.stderr) == (3, True)
    if form == "csv":
        path.write_text(f"file,from,to\n{root / 'a.mp4'},0,1\na.mp4,0,inf\ndeep/007.mp4,nan,1\n")
        times = ("--start-column", "from", "--end-column", "to", "--preset", "fast", "--json")
        done = tubeworks(*arguments, *times, "--kind", "video", "--out", tmp_path / "y")
        reasons = " ".join(failure["reason"] for failure in done.json["failed"])
        assert (done.json["written"], reasons.count("leads out of the folder")) == (0, 1)
        assert reasons.count("is empty or has no end") == 2
        path.write_text("file,file\na.mp4,a.mp4\n")
        assert "several columns are called file" in tubeworks(*arguments, "--out", tmp_path / "z").stderr


def test_a_table_cuts_segments_and_gives_heads(tubeworks: Shards, tmp_path: Path) -> None:
    root = write(tmp_path / "files", {"a.mkv": counting_video(30)})
    rows = "path,from,to,verb,noun\na.mkv,0.5,1.0,cut,\na.mkv,2,2.5,mix,egg\na.mkv,3,2,mix,egg\n"
    lists = write(tmp_path, {"list.csv": rows})
    out = tmp_path / "out"
    done = tubeworks(
        "shard", "table", "--table", lists / "list.csv", "--root", root, "--name", "mine", "--preset",
        "balanced", "--label-column", "verb", "--label-column", "noun", "--start-column", "from",
        "--end-column", "to", "--out", out, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert ["or has no end: 3 to 2 s" in row["reason"] for row in done.json["failed"]] == [True]
    made = sorted(samples(out).values(), key=lambda sample: sample.key)
    assert [numbers_of(payload(out, sample)) for sample in made] == [[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]]
    assert [about(out, sample)["targets"] for sample in made] == [[0, -1], [1, 0]]


def test_kinetics_as_deepmind_published_it(
    tubeworks: Shards, make_video: Callable[..., bytes], tmp_path: Path
) -> None:
    clip = {"annotations": {"label": "zumba", "segment": [3.0, 13.0]}, "subset": "train", "duration": 10.0}
    content = json.dumps({"abc": clip, "def": {**clip, "subset": "validate"}})
    root = write(tmp_path, {"v/zumba/abc_000003_000013.mp4": make_video(5), "train.json": content})
    done = tubeworks(
        "shard", "kinetics", "--videos", root / "v", "--annotations", root / "train.json", "--split", "train",
        "--name", "k700", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert (done.code, done.json["written"], done.json["missing"]) == (0, 1, [])


def test_a_member_that_is_twice_in_an_archive_is_said_and_counts_once(
    tubeworks: Shards, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    old, new = make_image(seed=1), make_image(seed=2)
    root = write(tmp_path, {"set.tar": tar({"cat/1.jpg": old, "cat/1.jpg*": new, "dog/1.jpg": old})})
    done = tubeworks("shard", "folder", "--input", root / "set.tar", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    assert done.json["written"] == 2
    assert ["more than once; the last one counts" in row["reason"] for row in done.json["failed"]] == [True]
    [cat] = [s for s in samples(tmp_path / "out").values() if s.label == 0]
    assert payload(tmp_path / "out", cat) == new, "as when unpacking"


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("ssv2", "{}", "not a list of Something-Something"),
        ("ssv2", '[{"label": "x"}]', "entry 0 has no id"),
        ("moments", "a.mp4,b\n", "not a list of Moments in Time"),
        ("kinetics", "[]", "not a Kinetics list"),
        ("kinetics", '{"x": {"annotations": {"segment": [0, Infinity]}}}', "has no segment"),
    ],
)
def test_lists_of_another_kind(
    tubeworks: Shards, tmp_path: Path, command: str, text: str, message: str
) -> None:
    path = tmp_path / ("list.json" if command != "moments" else "list.csv")
    path.write_text(text)
    done = tubeworks(
        "shard", command, "--videos", tmp_path, "--annotations", path, "--split", "train",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 3
    assert message in done.stderr
