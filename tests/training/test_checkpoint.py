"""A checkpoint that is not whole is found, set aside, and the one before is used."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rank_processes import journalled, start_training, train_to_end, wait_for_step

from framework.errors import CheckpointError
from framework.recipe.checkpoint_section import Checkpoint
from framework.training import checkpoint_manifest
from framework.training.checkpoint import choose_checkpoint, load_weights, newest_valid
from framework.training.checkpoint_manifest import (
    MANIFEST,
    LaterVersion,
    checkpoint_folders,
    folder_of,
    read_manifest,
    verify,
    write_manifest,
)
from framework.training.distributed import Peers
from framework.training.retention import prune
from framework.world import World

ALONE = Peers(World(), None)
KINDS = ("weight", "average", "exp_avg", "exp_avg_sq")
FILES = [
    MANIFEST,
    "fixed.safetensors",
    *(f"{kind}-0000{rank}.safetensors" for kind in KINDS for rank in (0, 1)),
]


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_checkpoint_holds_these_files(trained: Path) -> None:
    folder = newest_valid(trained)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert verify(folder) == []


@pytest.mark.parametrize("damage", [remove, truncate, flip, empty])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_the_one_before_is_used(
    run_copy: Path, file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest = folder_of(run_copy, 6)
    damage(newest / file)
    (problem,) = verify(newest)
    assert file in problem
    assert newest_valid(run_copy) == folder_of(run_copy, 3)
    assert newest.exists(), "looking changes nothing"

    assert choose_checkpoint(run_copy, ALONE) == folder_of(run_copy, 3)
    aside = newest.with_name("damaged-step-00000006")
    assert (aside / "REASON.txt").read_text() == problem + "\n"
    assert not newest.exists()
    assert "set aside as damaged-step-00000006" in caplog.text


def test_every_byte_of_the_manifest_counts(run_copy: Path) -> None:
    path = folder_of(run_copy, 6) / MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content) - 1, 97):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        path.write_bytes(changed)
        found = verify(path.parent)
        # the seventeenth digit of a number may be another one of the same number
        assert found or json.loads(changed) == json.loads(content), (
            f"byte {place}: {changed[place - 20 :][:40]!r}"
        )


def test_training_goes_on_from_the_checkpoint_before(
    recipe_file: Path, run_copy: Path, trained: Path
) -> None:
    flip(folder_of(run_copy, 6) / "weight-00001.safetensors")
    train_to_end(recipe_file, run_copy, 2)
    assert journalled(run_copy) == journalled(trained)
    ours, theirs = load_weights(newest_valid(run_copy)), load_weights(newest_valid(trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_if_all_are_damaged_nothing_starts_from_scratch_by_itself(recipe_file: Path, run_copy: Path) -> None:
    for folder in checkpoint_folders(run_copy):
        truncate(folder / "fixed.safetensors")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint .* fixed.safetensors has"):
        newest_valid(run_copy)
    for _ in range(2):  # and neither does the second call, which finds them set aside already
        with pytest.raises(CheckpointError, match=r"every checkpoint of .* damaged-step-00000006") as caught:
            choose_checkpoint(run_copy, ALONE)
        assert "new --run folder" in str(caught.value)
    job = start_training(recipe_file, run_copy, 1)
    assert job.wait() == [4]
    assert "error: every checkpoint of" in job.said()


def test_checkpoints_that_are_gone_are_not_taken_for_none(recipe_file: Path, run_copy: Path) -> None:
    shutil.rmtree(run_copy / "checkpoints")  # as where a mount has vanished
    with pytest.raises(CheckpointError, match=r"has saved checkpoints .* is everything mounted\?"):
        choose_checkpoint(run_copy, ALONE)


@pytest.mark.parametrize(
    ("number", "damaged"), [(errno.EIO, True), (errno.ESTALE, False), (errno.EACCES, False)]
)
def test_what_cannot_be_reached_is_not_set_aside(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, number: int, damaged: bool
) -> None:
    real = checkpoint_manifest.hash_file

    def failing(path: Path) -> str:
        if path.parent.name == "step-00000006":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint_manifest, "hash_file", failing)
    if damaged:  # the disk has lost it
        assert choose_checkpoint(run_copy, ALONE) == folder_of(run_copy, 3)
    else:
        with pytest.raises(CheckpointError, match="may be whole: nothing was changed"):
            choose_checkpoint(run_copy, ALONE)
    assert folder_of(run_copy, 6).exists() != damaged


def test_the_checkpoint_of_another_experiment_is_refused(
    recipe_file: Path, run_copy: Path, tmp_path: Path
) -> None:
    other = train_to_end(
        recipe_file, tmp_path / "other", 1, "train.steps=3", "optimizer.lr=0.5", "schedule.warmup=1"
    )
    shutil.rmtree(run_copy / "checkpoints")
    shutil.copytree(other / "checkpoints", run_copy / "checkpoints")
    job = start_training(recipe_file, run_copy, 1)
    assert job.wait() == [2], job.said()[-2000:]
    said = job.said()
    assert "step-00000003 holds a run of another experiment:" in said
    assert "  optimizer.lr: 0.5 -> 0.001\n" in said
    assert "Only these may change between attempts: name, " in said


def test_a_manifest_tells_where_it_comes_from(recipe_file: Path, run_copy: Path) -> None:
    manifest = read_manifest(folder_of(run_copy, 6))
    assert [one["ranks"] for one in manifest["attempts"]] == [2]
    assert manifest["recipe_values"]["optimizer"]["lr"] == 1e-3
    assert manifest["accumulation"] == 1
    assert len(manifest["counters"]) == 2, "of both ranks"
    assert manifest["counters"][0].keys() >= {"meters", "collapse", "dead"}


def test_a_later_format_is_not_taken_for_damage(run_copy: Path) -> None:
    path = folder_of(run_copy, 6) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(LaterVersion, match=r"format version 99, .* upgrade"):
        choose_checkpoint(run_copy, ALONE)
    assert path.exists()


def test_a_folder_of_another_kind_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"format": "something else"}')
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_manifest(tmp_path)


def test_what_a_killed_save_leaves_is_no_checkpoint_and_goes_away(
    recipe_file: Path, run_copy: Path, trained: Path
) -> None:
    newest = folder_of(run_copy, 6)
    leftover = newest.with_name(f".saving-{newest.name}")
    newest.rename(leftover)
    (leftover / "weight-00001.safetensors").unlink()
    half_removed = newest.with_name(".removing-step-00000001")
    half_removed.mkdir()
    assert newest_valid(run_copy) == folder_of(run_copy, 3)
    train_to_end(recipe_file, run_copy, 2)
    assert verify(newest) == []
    assert not leftover.exists()
    assert not half_removed.exists()
    assert journalled(run_copy) == journalled(trained)


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, 0, [9]), (3, 0, [7, 8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9]), (20, 0, list(range(1, 10)))],
)
def test_retention(tmp_path: Path, keep: int, every: int, left: list[int]) -> None:
    for step in range(1, 10):
        folder_of(tmp_path, step).mkdir(parents=True)
        write_manifest(folder_of(tmp_path, step), {"step": step, "files": []})
    removed = prune(tmp_path, Checkpoint(keep=keep, keep_every=every))
    assert checkpoint_folders(tmp_path) == [folder_of(tmp_path, step) for step in left]
    assert sorted(removed) == [folder_of(tmp_path, step) for step in range(1, 10) if step not in left]


def test_retention_while_training(recipe_file: Path, tmp_path: Path) -> None:
    settings = ("checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3")
    run = train_to_end(recipe_file, tmp_path / "run", 1, *settings)
    assert checkpoint_folders(run) == [folder_of(run, step) for step in (3, 5, 6)]
    assert all(verify(folder) == [] for folder in checkpoint_folders(run))


def test_averages_that_were_not_kept_are_not_made_up(recipe_file: Path, tmp_path: Path) -> None:
    run = train_to_end(recipe_file, tmp_path / "run", 1, "train.ema_decay=null", "train.steps=3")
    with pytest.raises(CheckpointError, match=r"no moving average.*ema_decay"):
        load_weights(newest_valid(run), ema=True)


# --- disks ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for one checkpoint of the tiny recipe, and not for two."""
    if sys.platform != "linux":
        pytest.skip("needs tmpfs")
    size = sum(path.stat().st_size for path in newest_valid(trained).iterdir())
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.6)}", "tmpfs", str(mount)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"needs to mount a tmpfs: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def remount(mount: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(mount)], check=True)


def test_no_space_left(recipe_file: Path, small_disk: Path, trained: Path) -> None:
    run = small_disk / "run"
    job = start_training(recipe_file, run, 2)
    assert job.wait() == [4, 4], job.said()[-2000:]
    message = job.said().splitlines()[-1]
    assert message.startswith("error: the checkpoint of step 6 was not written, earlier ones are untouched.")
    assert "no space left while writing" in message
    assert "Free space or choose another place, then start the same command again" in message
    assert checkpoint_folders(run) == [folder_of(run, 3)]
    assert verify(folder_of(run, 3)) == []
    assert shutil.disk_usage(small_disk).free > 2**16, "what was half written is gone"

    remount(small_disk, "size=64m")
    train_to_end(recipe_file, run, 2)
    assert journalled(run) == journalled(trained)
    assert newest_valid(run) == folder_of(run, 6)


def test_a_disk_without_a_byte_left_hides_no_reason(recipe_file: Path, small_disk: Path) -> None:
    remount(small_disk, "size=64m")
    run = small_disk / "run"
    job = start_training(recipe_file, run, 2, "train.steps=500")
    wait_for_step(job, run, 4)
    ballast = os.open(small_disk / "ballast", os.O_WRONLY | os.O_CREAT)
    while any(process.is_alive() for process in job.processes):  # what it takes back is taken again
        with contextlib.suppress(OSError):
            os.write(ballast, bytes(1 << 16))
    os.close(ballast)
    codes = job.wait()
    last = [line for line in job.said().splitlines() if line.startswith("error:")][-1]
    if codes == [4, 4]:
        assert "no space left while writing" in last
    else:
        assert codes == [1, 1]
        assert "journal.jsonl cannot be written: No space left on device" in last
    assert "Traceback" not in job.said()


def test_a_disk_that_turns_read_only(recipe_file: Path, small_disk: Path, trained: Path) -> None:
    remount(small_disk, "size=64m")
    run = Path(shutil.copytree(trained, small_disk / "run"))
    shutil.rmtree(folder_of(run, 6))
    remount(small_disk, "ro")
    job = start_training(recipe_file, run, 2)
    assert job.wait() == [4, 4]
    last = job.said().splitlines()[-1]
    assert last.startswith(f"error: cannot write {run}")
    assert "Read-only file system" in last
    assert "write permission" in last
    remount(small_disk, "rw")
    train_to_end(recipe_file, run, 2)


def test_a_file_where_the_run_should_be(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    job = start_training(recipe_file, tmp_path / "run", 1)
    assert job.wait() == [4]
    assert f"error: cannot write {tmp_path / 'run'}" in job.said()
    assert "Remove what is in its place, or choose another --run folder" in job.said()
