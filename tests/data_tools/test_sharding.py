"""Shards are whole or not there, the same bytes every time, and readable by stock tools."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools import staging as staging_module
from framework.data.manifest import Manifest
from framework.files import hash_file

Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def mixed(
    class_folders: Callable[..., Path], make_video: Callable[..., bytes], make_image: Callable[..., bytes]
) -> tuple[str, ...]:
    """Arguments for a mixed set: 12 clips (one broken) and 30 pictures (one broken), in several shards."""
    clips = {f"ice skating/c {i}.mp4": make_video(5 + i, seed=i) for i in range(6)}
    clips |= {f"yoga/{i}.mp4": make_video(10 + i, seed=10 + i) for i in range(5)}
    pictures = {f"{'catdog'[i % 2 * 3 :][:3]}/{i}.jpg": make_image(seed=i) for i in range(29)}
    first = class_folders(clips | {"yoga/broken.mp4": b"no film"}, "clips")
    second = class_folders(pictures | {"cat/broken.jpg": b"no picture"}, "pictures")
    return (
        "shard", "mix", "--shard-samples", "7",
        "--input", f"clips=folder:input={first}", "--input", f"pictures=folder:input={second}",
    )  # fmt: skip


def test_the_manifest_tells_where_every_byte_is(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = tubeworks(*mixed, "--out", out, "--json").json
    manifest = Manifest.open(out)
    assert (report["written"], len(manifest), report["shards"]) == (40, 40, len(manifest.shards))
    assert report["bytes"] == sum((out / shard.name).stat().st_size for shard in manifest.shards)
    for shard in manifest.shards:
        assert shard.samples <= 7
        assert hash_file(out / shard.name) == shard.blake2b
    for index in range(len(manifest)):
        sample = manifest.sample(index)
        with tarfile.open(out / sample.shard) as archive:
            info = archive.getmember(f"{sample.key}.{sample.extension}")
            label = archive.extractfile(f"{sample.key}.cls")
            assert label is not None
            assert int(label.read()) == sample.label
        assert (info.offset_data, info.size) == (sample.offset, sample.length)
        assert (info.mtime, info.uid, info.uname, info.isreg()) == (0, 0, "", True)
        payload = (out / sample.shard).read_bytes()[sample.offset : sample.offset + sample.length]
        assert zlib.crc32(payload) == sample.crc32


def test_stock_webdataset_reads_the_shards(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], tmp_path: Path
) -> None:
    webdataset = pytest.importorskip("webdataset")
    out = tmp_path / "out"
    tubeworks(*mixed, "--out", out)
    manifest = Manifest.open(out)
    urls = [str(out / shard.name) for shard in manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == list(manifest.column("key"))
    for index, sample in enumerate(read):
        told = manifest.sample(index)
        assert zlib.crc32(sample[told.extension]) == told.crc32
        assert int(sample["cls"]) == told.label
    [decoded] = [
        s for s in webdataset.WebDataset(urls, shardshuffle=False).decode() if "yoga-3" in s["__key__"]
    ]
    assert decoded["cls"] == 1
    assert decoded["json"]["class"] == "yoga"
    assert decoded["json"]["source"] == "yoga/3.mp4"


def test_the_same_bytes_from_any_number_of_workers_and_in_every_run(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], contents: Contents, tmp_path: Path
) -> None:
    for name, workers in (("one", 1), ("three", 3), ("again", 1)):
        assert tubeworks(*mixed, "--out", tmp_path / name, "--workers", workers).code == 0
    expected = contents(tmp_path / "one")
    assert len(expected) > 6
    assert contents(tmp_path / "three") == expected
    assert contents(tmp_path / "again") == expected
    assert tubeworks(*mixed, "--out", tmp_path / "other", "--seed", 1).code == 0
    assert contents(tmp_path / "other") != expected
    keys = [sorted(Manifest.open(tmp_path / name).column("key")) for name in ("one", "other")]
    assert keys[0] == keys[1], "the seed changes the order and nothing else"


def test_shards_are_numbered_without_gaps(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    """Every shard has one file here, and half of them are broken."""
    files = {f"cat/{i}.jpg": make_image(seed=i) if i % 2 else b"broken" for i in range(10)}
    root = class_folders(files)
    out = tmp_path / "out"
    report = tubeworks("shard", "folder", "--input", root, "--out", out, "--shard-samples", 1, "--json").json
    assert (report["written"], report["shards"], len(report["failed"])) == (5, 5, 5)
    assert sorted(path.name for path in out.glob("*.tar")) == [f"shard-{i:06d}.tar" for i in range(5)]
    assert tubeworks("verify", out, "--decode").code == 0


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_shard_and_is_finished_by_the_same_command(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    contents: Contents,
    tmp_path: Path,
) -> None:
    pictures = [make_image((256, 256), seed=i) for i in range(8)]
    root = class_folders({f"cat/{i:04d}.jpg": pictures[i % 8] for i in range(800)})
    out, staging = tmp_path / "out", tmp_path / "out.partial"
    arguments = ["shard", "folder", "--input", str(root), "--shard-samples", "8", "--workers", "2"]
    command = [sys.executable, "-m", "launch.cli", "data", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(staging.glob("*.done"))) >= 3 or process.poll() is not None)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists(), "no shard has its final name"
    finished = len(list(staging.glob("*.done")))
    assert 3 <= finished < 100
    assert len(workers) >= 2
    wait_until(lambda: not any(map(running, workers)), 20)  # workers do not outlive their parent

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of 100 shards are there already" in again.stderr
    assert not staging.exists()
    assert tubeworks(*arguments, "--out", tmp_path / "undisturbed").code == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_an_interrupted_run_ends_soon_and_keeps_what_is_done(
    class_folders: Callable[..., Path], make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    picture = make_image((512, 512))
    root = class_folders({f"cat/{i:04d}.jpg": picture for i in range(600)})
    staging = tmp_path / "out.partial"
    arguments = ["shard", "folder", "--input", str(root), "--shard-samples", "20", "--workers", "2"]
    command = [sys.executable, "-m", "launch.cli", "data", *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(staging.glob("*.done")) or process.poll() is not None)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert list(staging.glob("*.done"))
    wait_until(lambda: not any(map(running, workers)), 20)


def leave_unfinished(
    out: Path, mixed: tuple[str, ...], limit: int = 20000
) -> subprocess.CompletedProcess[str]:
    """A real run on a disk that takes no file longer than `limit` bytes."""
    code = (
        "import resource, runpy, sys;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "sys.argv[1:] = sys.argv[2:]; runpy.run_module('launch.cli', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "cli", "data", *mixed, "--out", str(out), "--workers", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_full_disk_is_said_and_the_work_is_kept(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], contents: Contents, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = leave_unfinished(out, mixed)
    assert done.returncode == 3
    assert "cannot write the shards (File too large)" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert tubeworks(*mixed, "--out", out).code == 0
    assert tubeworks(*mixed, "--out", tmp_path / "undisturbed").code == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_unfinished_work_of_other_settings_is_not_used(
    tubeworks: Callable[..., Any],
    mixed: tuple[str, ...],
    contents: Contents,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    leave_unfinished(out, mixed)
    assert (tmp_path / "out.partial").exists()
    assert tubeworks(*mixed, "--out", out, "--seed", 5).code == 0
    assert "starting anew" in caplog.text
    assert tubeworks(*mixed, "--out", tmp_path / "undisturbed", "--seed", 5).code == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_nothing_is_overwritten_unasked(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], contents: Contents, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert tubeworks(*mixed, "--out", out).code == 0
    before = contents(out)
    done = tubeworks(*mixed, "--out", out, "--seed", 2)
    assert (done.code, contents(out) == before) == (3, True)
    assert "exists already" in done.stderr
    assert tubeworks(*mixed, "--out", out, "--seed", 2, "--overwrite").code == 0
    assert contents(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "out", "pictures"]


def test_overwrite_spares_folders_that_are_no_shards(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], tmp_path: Path
) -> None:
    thesis = tmp_path / "out" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    done = tubeworks(*mixed, "--out", tmp_path / "out", "--overwrite")
    assert done.code == 3
    assert "replaces only a folder of shards" in done.stderr
    assert thesis.exists()

    foreign = tmp_path / "new.partial" / "notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    done = tubeworks(*mixed, "--out", tmp_path / "new")
    assert done.code == 3
    assert "holds other files (notes.txt)" in done.stderr
    assert foreign.exists()


def test_two_runs_do_not_work_on_the_same_shards(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], tmp_path: Path
) -> None:
    staging = tmp_path / "out.partial"
    staging.mkdir()
    folder = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        done = tubeworks(*mixed, "--out", tmp_path / "out")
    finally:
        os.close(folder)
    assert done.code == 3
    assert "another process is making these shards" in done.stderr


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:  # as Lustre does without its mount option `flock`
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with staging_module.locked(tmp_path / "out.partial"):
        assert (tmp_path / "out.partial").is_dir()
    assert "cannot be locked" in caplog.text


def test_a_place_that_cannot_be_written(
    tubeworks: Callable[..., Any], mixed: tuple[str, ...], tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = tubeworks(*mixed, "--out", blocker / "out")
    assert done.code == 3
    assert "cannot write the shards" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k400", "write it as NAME=kinetics:"),
        ("k400=imagenet:input=x", "write it as NAME=kinetics:"),
        ("k400=kinetics:videos=a,annotations=b", "lacks split"),
        ("a=folder:inptu=b", "'inptu=b' is no option of folder"),
        ("a=folder:input=b,kind=sound", "kind is image or video"),
        ("../x=folder:input=HERE", "cannot name a data set"),
    ],
)
def test_inputs_that_are_not_understood(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    tmp_path: Path,
    text: str,
    message: str,
) -> None:
    root = class_folders({"cat/1.jpg": make_image()})
    done = tubeworks("shard", "mix", "--input", text.replace("HERE", str(root)), "--out", tmp_path / "out")
    assert done.code == 3
    assert message in done.stderr


def test_paths_with_commas_and_equal_signs(
    tubeworks: Callable[..., Any],
    class_folders: Callable[..., Path],
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    root = class_folders({"cat/1.jpg": make_image()}, "a,b=c: d")
    text = f"pets=folder:input={root},split=val"
    assert tubeworks("shard", "mix", "--input", text, "--out", tmp_path / "out").code == 0
    assert Manifest.open(tmp_path / "out").datasets[0].split == "val"
