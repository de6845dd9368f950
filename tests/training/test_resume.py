"""A run that is interrupted goes on as if nothing had been: same losses, same weights, bit by bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from rank_processes import (
    journalled,
    start_training,
    steps_in_journal,
    train_to_end,
    wait_for_checkpoint,
    wait_for_step,
)

from framework.training.checkpoint import load_weights, newest_valid
from framework.training.checkpoint_manifest import checkpoint_folders

LONG = ("train.steps=60", "checkpoint.every=20")


@pytest.fixture(scope="module")
def whole(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    return train_to_end(recipe_file, tmp_path_factory.mktemp("whole") / "run", 2, *LONG)


def assert_same_run(run: Path, whole: Path) -> None:
    """Every number of every step, the weights and their averages are equal bit by bit."""
    assert journalled(run) == journalled(whole)
    for ema in (False, True):
        ours, theirs = (load_weights(newest_valid(folder), ema) for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_losses_change_so_that_equality_means_something(whole: Path) -> None:
    losses = [metrics["train/loss"] for metrics in journalled(whole).values()]
    assert len(losses) == 60
    assert len(set(losses)) == 60
    assert sum(losses[-10:]) < sum(losses[:10])


def test_killed_between_checkpoints_and_started_again(recipe_file: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *LONG)
    wait_for_step(job, run, 24)
    wait_for_checkpoint(job, run, 20)
    job.kill()
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-00000020"]
    reached = steps_in_journal(run)
    before = journalled(run)

    train_to_end(recipe_file, run, 2, *LONG)

    assert_same_run(run, whole)
    entries = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    replayed = [e["step"] for e in entries if e["attempt"] == 1 and "train/loss" in e["metrics"]]
    assert replayed == list(range(21, 61)), "the second attempt goes on from the checkpoint"
    assert before == {step: journalled(whole)[step] for step in range(1, reached + 1)}
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [attempt["start_step"] for attempt in attempts] == [0, 20]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_asked_to_stop_by_a_signal_to_one_rank(
    recipe_file: Path, tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *LONG, "data.workers=1")
    wait_for_step(job, run, 3)
    job.send(number, ranks=[1])
    assert job.wait() == [128 + number] * 2, job.said()[-2000:]
    (saved,) = checkpoint_folders(run)
    assert int(saved.name.removeprefix("step-")) == steps_in_journal(run), "saved at once"
    assert "stopped after" in job.said()

    train_to_end(recipe_file, run, 2, *LONG)
    assert_same_run(run, whole)


def test_a_signal_breaks_an_evaluation_off(recipe_file: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    held_out = [f"data.sources.{name}.validation={shards}/val" for name in ("motion", "digits")]
    long_evaluation = ["train.eval_every=2", "evaluation.temporal_views=400", "evaluation.batch=1"]
    job = start_training(recipe_file, run, 2, "train.steps=4", *held_out, *long_evaluation)
    wait_for_step(job, run, 2)
    job.send(signal.SIGTERM, ranks=[1])
    assert job.wait() == [128 + signal.SIGTERM] * 2, job.said()[-2000:]
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-00000002"]
    assert "eval/" not in (run / "journal.jsonl").read_text()


def test_a_killed_rank_lets_the_others_leave(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *LONG)
    wait_for_step(job, run, 3)
    job.send(signal.SIGKILL, ranks=[1])
    codes = job.wait(30)
    assert codes == [6, -signal.SIGKILL]
    assert "error: lost contact to another rank" in job.said()
    assert "Traceback" not in job.said()


def test_a_run_that_is_over_trains_no_more(recipe_file: Path, run_copy: Path) -> None:
    before = journalled(run_copy)
    train_to_end(recipe_file, run_copy, 2)
    assert journalled(run_copy) == before


def test_one_training_at_a_time(recipe_file: Path, run_copy: Path) -> None:
    from framework.tracking.lock import RunLock
    from framework.training.run_folder import take_alone

    lock = RunLock(run_copy, ".training.lock")
    take_alone(run_copy, lock)
    job = start_training(recipe_file, run_copy, 2)
    assert job.wait() == [1, 1]
    # its attempt has not begun: since when the one before it ran would say nothing
    assert f"error: another training works in {run_copy}: wait for it" in job.said()
    lock.release()
    train_to_end(recipe_file, run_copy, 2)
