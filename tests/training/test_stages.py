"""Every ZeRO stage and precision: it trains to the same losses, and its state survives bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_processes import Job
from stage_worker import all_cases

from framework.errors import RecipeError
from framework.models.registry import build_model, inputs_of
from framework.recipe.schema import Recipe
from framework.training.engine import deepspeed_config
from framework.world import World

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
NAMES = [f"{stage}-{precision}" for stage, precision in CASES]


@pytest.fixture(scope="module")
def results(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found for every case."""
    folder = tmp_path_factory.mktemp("stages")
    job = Job(2, folder, all_cases, str(recipe_file), str(folder), CASES)
    assert job.wait(200) == [0, 0], job.said()[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", NAMES)
def test_losses_are_those_of_plain_fp32(results: list[dict[str, Any]], case: str) -> None:
    tolerance = 0.02 if case.endswith("bf16") else 1e-5
    assert results[0][case]["losses"] == pytest.approx(results[0]["0-fp32"]["losses"], rel=tolerance)
    assert results[0][case]["losses"] == results[1][case]["losses"]


@pytest.mark.parametrize("case", NAMES)
def test_saved_and_loaded_bit_by_bit(results: list[dict[str, Any]], case: str) -> None:
    for rank in (0, 1):
        found = results[rank][case]
        assert found["kinds"] == ["weight", "average", "exp_avg", "exp_avg_sq"]
        assert found["loaded_equal"]
        assert found["continued_equal"], "the same steps from it give the same weights and moments"
        assert found["again"] == found["losses"][3:]


@pytest.mark.parametrize("case", NAMES)
def test_every_element_has_one_owner(
    results: list[dict[str, Any]], make_recipe: Callable[..., Recipe], case: str
) -> None:
    recipe = make_recipe()
    model = build_model(recipe.model, inputs_of(recipe))
    total = sum(parameter.numel() for parameter in model.parameters())
    owned = [results[rank][case]["elements"] for rank in (0, 1)]
    if case.startswith("0"):
        assert owned == [total, total]
    else:
        assert sum(owned) == total
        assert min(owned) > 0.3 * total


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_weights_are_saved_whole(results: list[dict[str, Any]], stage: int) -> None:
    assert results[0][f"{stage}-fp32"]["frozen_kept"]


def test_bf16_without_zero_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="bf16 takes zero: 1"):
        make_recipe("engine.zero=0", "engine.precision=bf16")


def test_what_deepspeed_is_told(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("train.accumulation=2", "optimizer.clip=null", "engine.zero=2")
    config = deepspeed_config(recipe, World(0, 2, 0, 2))
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.0, "said, because DeepSpeed's own default is not off"
    assert config["zero_optimization"]["stage"] == 2
    assert "bf16" not in config
    assert deepspeed_config(make_recipe("engine.precision=bf16"), World())["bf16"]["enabled"] is True
