"""A checkpoint goes on with any number of ranks, any ZeRO stage and any accumulation, equal to rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_worker import MIXTURE, all_stages
from rank_processes import Job, journalled, train_to_end

from framework.training.checkpoint import load_weights, newest_valid
from framework.training.elastic import fit_accumulation

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
        (1, ["engine.zero=2", "train.accumulation=4"]),
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


@pytest.fixture(scope="module")
def matrix(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every number of ranks under every stage goes on with what the cell before it wrote."""
    folder = tmp_path_factory.mktemp("matrix")
    reference = train_to_end(recipe_file, folder / "reference", 2, *MIXTURE)
    found: dict[str, Any] = {"reference": journalled(reference)}
    source = reference / "checkpoints" / "step-00000003"
    for ranks in (1, 2, 3, 4):
        job = Job(ranks, folder / f"logs-{ranks}", all_stages, str(recipe_file), str(source), str(folder))
        codes = job.wait(300)
        assert codes == [0] * ranks, [job.said(rank)[-3000:] for rank in range(ranks)]
        found |= json.loads((folder / f"ranks-{ranks}.json").read_text())
        source = Path(found[f"{ranks}-3"]["folder"])
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_and_any_stage_go_on(matrix: dict[str, Any], ranks: int, stage: int) -> None:
    cell = matrix[f"{ranks}-{stage}"]
    assert cell["unequal"] == [], "weights, averages, moments and buffers, after another conversion"
    assert cell["tensors"] > 100
    for step, loss in zip((4, 5, 6), cell["losses"], strict=True):
        assert loss == pytest.approx(matrix["reference"][step]["train/loss"], rel=1e-5), step


def attempt(ranks: int, accumulation: int, asked: int) -> dict[str, int]:
    return {"ranks": ranks, "accumulation": accumulation, "asked_accumulation": asked}


@pytest.mark.parametrize(
    ("asked", "ranks", "attempts", "expected"),
    [
        (1, 4, [], 1),
        (1, 4, [attempt(4, 1, 1)], 1),
        (1, 2, [attempt(4, 1, 1)], 2),
        (1, 1, [attempt(4, 1, 1)], 4),
        (1, 3, [attempt(4, 1, 1)], 2),  # 6 micro-batches: 4 do not divide by 3
        (1, 4, [attempt(4, 1, 1), attempt(3, 2, 1)], 1),  # back to where it was
        (2, 4, [attempt(2, 2, 2)], 1),
        (3, 2, [attempt(4, 1, 1)], 3),  # somebody asks for another: that counts
        (1, 5, [attempt(4, 1, 1)], 1),  # does not divide at all: left to the check that says so
        (1, 2, [{"ranks": 4}], 1),  # of a version that did not write it down
    ],
)
def test_micro_batches_stay_no_larger(
    asked: int, ranks: int, attempts: list[dict[str, int]], expected: int
) -> None:
    assert fit_accumulation({"motion": 24, "digits": 12}, asked, ranks, attempts) == expected


def test_fewer_ranks_accumulate_more_by_themselves(recipe_file: Path, trained: Path, tmp_path: Path) -> None:
    run = continue_from_half(recipe_file, trained, tmp_path / "run", 1)
    assert_close(run, trained)
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [(one["ranks"], one["accumulation"]) for one in attempts] == [(2, 1), (1, 2)]
    assert attempts[-1]["asked_accumulation"] == 1
    assert "accumulation: 1" in (run / "recipe.yaml").read_text(), "the recipe says what was asked for"
