"""A checkpoint goes on with any number of ranks, any ZeRO stage and any accumulation, equal to rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rank_processes import journalled, train_to_end

from framework.training.checkpoint import load_weights, newest_valid

LOSSES = ("train/loss", "train/motion/loss", "train/digits/loss")


def continue_from_half(recipe_file: Path, trained: Path, run: Path, ranks: int, *overrides: str) -> Path:
    """Train the second half of a run again in a copy of it."""
    shutil.copytree(trained, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    return train_to_end(recipe_file, run, ranks, *overrides)


def assert_close(run: Path, trained: Path) -> None:
    ours, theirs = journalled(run), journalled(trained)
    assert ours.keys() == theirs.keys() == set(range(1, 7))
    for step in theirs:
        for name in LOSSES:
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5), (step, name)
        assert ours[step]["train/grad_norm"] == pytest.approx(theirs[step]["train/grad_norm"], rel=1e-4)
    for ema in (False, True):
        mine, other = (load_weights(newest_valid(folder), ema) for folder in (run, trained))
        for name in other:
            # Adam's step is lr x sign-like: where a gradient is nearly 0, rounding may turn it
            torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["engine.zero=1"]),
        (1, ["engine.zero=2", "train.accumulation=4"]),
        (2, ["engine.zero=3"]),
        (2, ["engine.zero=2", "train.activation_checkpointing=true"]),
        (2, ["engine.zero=0", "train.accumulation=2"]),
        (4, ["engine.zero=1", "data.workers=1"]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(value),
)
def test_other_ranks_and_stages_go_on(
    recipe_file: Path, trained: Path, tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    run = continue_from_half(recipe_file, trained, tmp_path / "run", ranks, *overrides)
    assert_close(run, trained)


@pytest.mark.parametrize("stage", [0, 3])
def test_what_other_stages_write_goes_on(
    recipe_file: Path, trained: Path, tmp_path: Path, stage: int
) -> None:
    first = train_to_end(recipe_file, tmp_path / "first", 2, f"engine.zero={stage}")
    assert_close(first, trained)
    run = continue_from_half(recipe_file, first, tmp_path / "run", 1, "engine.zero=1")
    assert_close(run, trained)
