"""What can be wrong when training starts: a message that names the thing, and a code that is not 0."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import CPU, Job, journalled, start_training


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """Shards to be damaged."""
    return Path(shutil.copytree(shards / "train", tmp_path / "own"))


def over(folder: Path) -> list[str]:
    return [f"data.sources.{name}.path={folder}" for name in ("motion", "digits")]


def assert_refused(job: Job, code: int, *texts: str) -> None:
    assert job.wait() == [code] * len(job.processes), job.said()[-3000:]
    for rank in range(len(job.processes)):
        message = job.said(rank)[job.said(rank).index("error: ") :]
        for text in texts:
            assert text in message, (rank, message)
        assert "Traceback" not in job.said(rank)


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["train.stepz=5"], ["train.stepz", "steps"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["optimizer.lr=-1"], ["optimizer.lr"]),
        (["train.stepz=5", "engine.zero=7"], ["train.stepz", "engine.zero"]),
    ],
)
def test_recipes_that_say_nothing(
    recipe_file: Path, tmp_path: Path, overrides: list[str], texts: list[str]
) -> None:
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe_file), *overrides]
    done = subprocess.run(
        [*command, "--ranks", "2", "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert all(text in done.stderr for text in texts), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_shard(recipe_file: Path, own_shards: Path, tmp_path: Path) -> None:
    (shard,) = own_shards.glob("*.tar")
    shard.unlink()
    job = start_training(recipe_file, tmp_path / "run", 2, *over(own_shards))
    assert_refused(job, 3, shard.name, str(own_shards))


def test_a_shard_that_is_short(recipe_file: Path, own_shards: Path, tmp_path: Path) -> None:
    (shard,) = own_shards.glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    assert_refused(start_training(recipe_file, tmp_path / "run", 1, *over(own_shards)), 3, shard.name)


def test_no_shards_at_all(recipe_file: Path, tmp_path: Path) -> None:
    job = start_training(recipe_file, tmp_path / "run", 1, *over(tmp_path / "nowhere"))
    assert_refused(job, 3, str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists(), "nothing began, so nothing is left behind"


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("late", ["model.heads=3", "init.weights=/nowhere", "data.sources.motion.classes=9"])
def test_a_refused_start_leaves_nothing(recipe_file: Path, tmp_path: Path, ranks: str, late: str) -> None:
    run = tmp_path / "runs" / "mine"
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe_file), late, "--run", str(run)]
    done = subprocess.run(
        [*command, "--ranks", ranks], env={**os.environ, **CPU}, capture_output=True, text=True, check=False
    )
    assert done.returncode in (2, 3), done.stderr
    assert done.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == [], "not even the folder above it"


def test_held_out_shards_are_looked_at_before_the_first_step(recipe_file: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    job = start_training(recipe_file, tmp_path / "run", 2, f"data.sources.motion.validation={nowhere}")
    assert_refused(job, 3, str(nowhere))
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_a_journal_that_cannot_be_opened_ends_all_ranks_alike(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "journal.jsonl").mkdir(parents=True)
    assert_refused(start_training(recipe_file, tmp_path / "run", 2), 1, "journal.jsonl cannot be written")


def test_a_manifest_of_a_later_version(recipe_file: Path, own_shards: Path, tmp_path: Path) -> None:
    path = own_shards / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 7}))
    job = start_training(recipe_file, tmp_path / "run", 1, *over(own_shards))
    assert_refused(job, 3, "version 7", "upgrade", str(own_shards))


def flip_a_byte_of_a_sample(folder: Path) -> str:
    """Damage the first video; returns its key."""
    from framework.data.manifest import Manifest

    manifest = Manifest.open(folder)
    sample = manifest.sample(int(manifest.select("motion", "motion", "video")[0]))
    with (folder / sample.shard).open("r+b") as file:
        file.seek(sample.offset + sample.length // 2)
        (byte,) = file.read(1)
        file.seek(sample.offset + sample.length // 2)
        file.write(bytes([byte ^ 16]))
    return sample.key


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_byte_stops_all_ranks(
    recipe_file: Path, own_shards: Path, tmp_path: Path, workers: int
) -> None:
    key = flip_a_byte_of_a_sample(own_shards)
    job = start_training(
        recipe_file, tmp_path / "run", 2, *over(own_shards), f"data.workers={workers}", "train.steps=4"
    )
    assert_refused(job, 3, "source motion", key, "shard-000000.tar", "offset")


def test_a_flipped_byte_is_replaced_if_the_recipe_says_so(
    recipe_file: Path, own_shards: Path, tmp_path: Path
) -> None:
    key = flip_a_byte_of_a_sample(own_shards)
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *over(own_shards), "data.on_corrupt=substitute")
    assert job.wait() == [0, 0]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    replaced = [event for event in events if event["kind"] == "replaced"]
    assert len(replaced) == 2, "6 steps of 8 are two epochs of 24, and every epoch holds it once"
    assert {event["key"] for event in replaced} == {key}


@pytest.mark.parametrize(
    ("ranks", "accumulation", "advice"),
    [
        (3, 1, "these numbers of ranks work: 1, 2, 4, 8."),
        (2, 8, "values of train.accumulation work: 1, 2, 4."),
    ],
)
def test_a_mixture_that_the_ranks_do_not_divide(
    recipe_file: Path, tmp_path: Path, ranks: int, accumulation: int, advice: str
) -> None:
    job = start_training(recipe_file, tmp_path / "run", ranks, f"train.accumulation={accumulation}")
    assert job.wait()[0] == 2
    said = job.said()
    assert "motion" in said
    assert "digits" in said
    assert advice in said
    assert "Traceback" not in said


def test_a_rate_that_is_far_too_high(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_training(
        recipe_file,
        run,
        2,
        "optimizer.lr=1e30",
        "optimizer.clip=null",
        "schedule.warmup=0",
        "checkpoint.every=1",
        "guards.bad_limit=3",
    )
    assert_refused(job, 5, "optimizer.lr", "schedule.warmup", "new --run folder")
    for folder in (run / "checkpoints").glob("*"):
        from framework.training.checkpoint import load_weights

        assert all(bool(weight.isfinite().all()) for weight in load_weights(folder).values())


def test_gradients_that_are_not_finite_are_skipped_and_counted(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # float32 holds up to 3.4e38: the loss fits, its gradients times this weight do not
    job = start_training(recipe_file, run, 2, "data.sources.motion.loss_weight=1e37")
    codes = job.wait()
    assert codes == [0, 0], job.said()[-2000:]
    steps = journalled(run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    skipped = [event["step"] for event in events if event["kind"] == "skipped"]
    assert len(skipped) == steps[6]["train/skipped_steps"] > 0
    assert f"step {skipped[0]} was not applied" in job.said()


def test_classes_that_do_not_fit(recipe_file: Path, tmp_path: Path) -> None:
    job = start_training(recipe_file, tmp_path / "run", 1, "data.sources.motion.classes=9")
    assert_refused(job, 3, "8 classes", "data.sources.motion.classes=8")
