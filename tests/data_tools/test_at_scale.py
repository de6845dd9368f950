"""Sharding in tasks: any process may make any shard, or die, the disk may fill: the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools import sharding
from data_tools.merging import merge
from data_tools.pool import run_tasks
from data_tools.shard_plan import open_plan
from framework.data.manifest import Manifest
from framework.errors import DataError

Shards = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def pictures(class_folders: Callable[..., Path], make_image: Callable[..., bytes]) -> tuple[str, ...]:
    """Arguments for 40 pictures in 8 shards, one of which holds nothing usable and one a broken file."""
    files = {f"cat/{i:03d}.jpg": make_image((200, 160), seed=i) for i in range(39)}
    root = class_folders(files | {"cat/broken.jpg": b"broken"})
    return ("shard", "folder", "--input", str(root), "--shard-samples", "5")


def test_shares_made_apart_and_merged_are_the_same_bytes(
    tubeworks: Shards, pictures: tuple[str, ...], contents: Contents, tmp_path: Path
) -> None:
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    assert tubeworks(*pictures, "--out", whole).code == 0
    done = tubeworks(*pictures, "--out", apart, "--plan-only", "--json")
    assert (done.code, done.json["shards"]) == (0, 8)
    shares = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "launch.cli",
                "data",
                "shard",
                "run",
                apart,
                "--task",
                str(k),
                "--of",
                "2",
            ],
            stdout=subprocess.PIPE,
        )
        for k in (0, 1)
    ]
    early = tubeworks("shard", "merge", apart)
    assert early.code == 3, "the shards are not there, or others are at work"
    for share in shares:
        share.communicate(timeout=120)
        assert share.returncode == 0
    assert sharding.unfinished(apart) == []
    again = tubeworks("shard", "run", apart, "--json")
    assert (again.json["shards"], again.json["made"]) == (8, 0)
    assert tubeworks("shard", "merge", apart).code == 0
    assert contents(apart) == contents(whole)
    assert not apart.with_name("apart.partial").exists()


def test_merging_says_which_shards_are_not_made(
    tubeworks: Shards, pictures: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert tubeworks(*pictures, "--out", out, "--plan-only").code == 0
    assert tubeworks("shard", "run", out, "--task", 1, "--of", 3).code == 0
    done = tubeworks("shard", "merge", out)
    assert done.code == 3
    assert "5 of 8 shards are not made yet: 0, 2, 3, 5, 6" in done.stderr
    assert tubeworks("shard", "run", tmp_path / "nothing").code == 3
    assert tubeworks("shard", "run", out, "--task", 3, "--of", 3).code == 3


@pytest.mark.parametrize("step", ["rename_part", "describe", "named"])
def test_a_merge_that_dies_is_finished_by_the_same_command(
    tubeworks: Shards,
    pictures: tuple[str, ...],
    contents: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """Whether it dies among the renames, before the manifest, or when the folder has its name already."""

    class Died(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Died

    out = tmp_path / "out"
    assert tubeworks(*pictures, "--out", tmp_path / "whole").code == 0
    assert tubeworks(*pictures, "--out", out, "--plan-only").code == 0
    assert tubeworks("shard", "run", out).code == 0
    staging = out.with_name("out.partial")
    rename, names = Path.rename, []

    def some_renames(path: Path, target: Path) -> Path:
        names.append(path)
        if len(names) > 3:
            raise Died
        return rename(path, target)

    with monkeypatch.context() as patch:
        if step == "rename_part":
            patch.setattr(Path, "rename", some_renames)
        else:
            target = {
                "describe": "data_tools.merging.write_manifest",
                "named": "data_tools.merging.remove_staging",
            }
            patch.setattr(target[step], die)
        with pytest.raises(Died):
            merge(open_plan(staging), out, overwrite=False)
    assert staging.exists()
    done = tubeworks(*pictures, "--out", out)
    assert done.code == 0, done.stderr
    assert contents(out) == contents(tmp_path / "whole")
    assert not staging.exists()


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in text.split()}
    return [child for child, command in names.items() if b"spawn_main" in command]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_killed_workers_lose_nothing(
    tubeworks: Shards, class_folders: Callable[..., Path], make_image: Callable[..., bytes],
    contents: Contents, tmp_path: Path,
) -> None:  # fmt: skip
    pictures = [make_image((256, 256), seed=i) for i in range(8)]
    root = class_folders({f"cat/{i:04d}.jpg": pictures[i % 8] for i in range(600)})
    arguments = ["shard", "folder", "--input", str(root), "--shard-samples", "20"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch.cli", "data", *arguments, "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    staging, killed, end = tmp_path / "out.partial", 0, time.monotonic() + 120
    while process.poll() is None and killed < 3 and time.monotonic() < end:
        if len(list(staging.glob("*.done"))) > 2 * killed:
            for child in children_of(process.pid)[:1]:
                os.kill(child, signal.SIGKILL)
                killed += 1
        time.sleep(0.02)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert killed == 3
    assert "killed by SIGKILL" in errors
    assert tubeworks(*arguments, "--out", tmp_path / "undisturbed").code == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


def deadly(task: tuple[str, ...], advance: Callable[[], None]) -> list[str]:
    """A task like a decoder that crashes on one piece and hangs on another."""
    for piece in task:
        if piece == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if piece == "hang":
            time.sleep(1000)
        advance()
    return list(task)


def test_a_piece_that_ends_two_processes_is_taken_out_and_named() -> None:
    blamed: list[tuple[str, str]] = []

    def blame(task: tuple[str, ...], piece: int, reason: str) -> tuple[str, ...]:
        blamed.append((task[piece], reason))
        return (*task[:piece], "left out", *task[piece + 1 :])

    tasks = [("a", "crash", "b"), ("c", "d"), ("hang",)]
    results = list(run_tasks(deadly, tasks, 2, lambda _: None, blame=blame, patience=3.0))
    assert sorted(results) == [["a", "left out", "b"], ["c", "d"], ["left out"]]
    assert sorted(blamed) == [("crash", "killed by SIGSEGV"), ("hang", "took more than 3 s")]


def test_processes_that_die_with_nothing_to_blame_end_the_run() -> None:
    with pytest.raises(DataError, match="die again and again"):
        list(run_tasks(deadly, [("crash",), ("a",)], 2, lambda _: None))


class Unstartable:
    """A function at whose arrival a process ends, before it has a task."""

    def __reduce__(self) -> tuple[Callable[[int], Any], tuple[int]]:
        return os._exit, (9,)

    def __call__(self, task: str, advance: Callable[[], None]) -> str:
        raise AssertionError("never reached")


def test_processes_that_die_before_their_task_blame_no_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.pool._DEATHS_IN_A_ROW", 3)
    blamed: list[int] = []

    def blame(task: str, piece: int, reason: str) -> str:
        blamed.append(piece)
        return task

    with pytest.raises(DataError, match="exit code 9"):
        list(run_tasks(Unstartable(), ["a", "b"], 2, lambda _: None, blame=blame))
    assert blamed == []


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounts a file system")
def test_a_disk_that_is_really_full_loses_nothing(
    tubeworks: Shards, pictures: tuple[str, ...], contents: Contents, tmp_path: Path
) -> None:
    """A file system of 300 kB for shards of 500 kB; `test_sharding` limits the size of files instead."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs; test_sharding limits file sizes instead")
    try:
        full = tubeworks(*pictures, "--out", disk / "out")
        assert full.code == 3
        assert "No space left on device" in full.stderr
        kept = len(list((disk / "out.partial").glob("*.done")))
        assert 0 < kept < 8
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert tubeworks(*pictures, "--out", disk / "out").code == 0
        assert tubeworks(*pictures, "--out", tmp_path / "whole").code == 0
        assert contents(disk / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("samples", "shards"), [(1, 40), (40, 1), (100_000, 1)])
def test_shards_of_one_sample_to_very_many(
    tubeworks: Shards, pictures: tuple[str, ...], tmp_path: Path, samples: int, shards: int
) -> None:
    out = tmp_path / "out"
    done = tubeworks(*pictures[:-1], samples, "--out", out, "--json")
    assert (done.json["written"], done.json["shards"]) == (39, shards - (samples == 1))
    assert len(Manifest.open(out)) == 39


def test_a_data_set_of_one_sample_among_classes_without_any(
    tubeworks: Shards, class_folders: Callable[..., Path], make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    root = class_folders({"cat/1.jpg": make_image(), "dog/1.jpg": b"broken"})
    (root / "eel").mkdir()
    done = tubeworks("shard", "folder", "--input", root, "--name", "pets", "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    dataset = Manifest.open(tmp_path / "out").datasets[0]
    assert (dataset.classes, dataset.samples) == (("cat", "dog", "eel"), 1)
    assert "none of dog, eel" in tubeworks("inspect", tmp_path / "out").stdout
