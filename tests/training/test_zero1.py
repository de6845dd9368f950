"""The own update of ZeRO-1 in bf16 does what DeepSpeed's does, and the host waits for it last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_processes import Job
from zero1_worker import STEPS, compare

CASES = {
    "clipped": ("optimizer.clip=0.05", "optimizer.weight_decay=0.1"),
    "not clipped": ("optimizer.clip=null",),
    "two micro-batches": ("train.accumulation=2", "optimizer.clip=0.05"),
    "adam": ("optimizer.name=adam", "optimizer.weight_decay=0.1"),
}


@pytest.fixture(scope="module")
def results(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("zero1")
    job = Job(2, folder, compare, str(recipe_file), str(folder), CASES)
    assert job.wait(200) == [0, 0], job.said()[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_deepspeed(results: list[dict[str, Any]], case: str) -> None:
    for found in results:
        theirs, ours = found[case]["theirs"], found[case]["ours"]
        assert (theirs["class"], ours["class"]) == ("BF16_Optimizer", "Zero1")
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        for mine, other in zip(ours["masters"], theirs["masters"], strict=True):
            assert mine == pytest.approx(other, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_an_infinite_gradient_of_one_rank_moves_no_weight(results: list[dict[str, Any]], case: str) -> None:
    for found in results:
        ours = found[case]["ours"]
        assert ours["applied"] == found[case]["theirs"]["applied"] == [True, True, False, True, True]
        assert ours["norms"][2] == float("inf")
        assert ours["adam_steps"] == found[case]["theirs"]["adam_steps"] == [STEPS - 1] * 2


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_weights(results: list[dict[str, Any]], case: str) -> None:
    first, second = (found[case]["ours"]["weights"] for found in results)
    assert first == second


def test_the_host_waits_when_all_is_queued(results: list[dict[str, Any]]) -> None:
    """DeepSpeed's class asks for the norm before it clips, and again before the optimizer."""
    ours, theirs = (results[0]["clipped"][way]["names"] for way in ("ours", "theirs"))
    assert ours.index("_local_scalar_dense") > ours.index("_fused_adamw_")
    assert theirs.index("_local_scalar_dense") < theirs.index("_fused_adamw_")
    assert "_local_scalar_dense" not in ours[: len(ours) - 2]


def test_an_update_takes_few_operators(results: list[dict[str, Any]]) -> None:
    """Theirs grow with the number of tensors, ten here and hundreds in a ViT-H."""
    ours, theirs = (len(results[0]["clipped"][way]["names"]) for way in ("ours", "theirs"))
    assert ours < theirs
