"""The learning rate by its formula, and who decays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from framework.errors import RecipeError
from framework.models.registry import build_model, inputs_of
from framework.recipe.schema import Optimizer, Recipe, Schedule
from framework.training.optim import build_optimizer, learning_rate, parameter_groups, resolve_schedule


def rates(steps: int, **schedule: Any) -> list[float]:
    settings = Schedule(**schedule)
    return [learning_rate(step, base=2.0, steps=steps, schedule=settings) for step in range(steps)]


def test_warm_up_is_linear_and_never_zero() -> None:
    assert rates(10, warmup=4)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_cosine() -> None:
    expected = [0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates(10, warmup=4, final=0.1)[4:] == pytest.approx(expected)
    assert rates(8)[0] == 2.0
    assert rates(8)[4] == pytest.approx(1.0)


def test_cosine_ends_at_its_final_share() -> None:
    end = learning_rate(10, base=2.0, steps=10, schedule=Schedule(warmup=4, final=0.1))
    assert end == pytest.approx(0.2)


def test_constant() -> None:
    assert rates(5, name="constant", warmup=2) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0])


def test_warm_up_may_not_be_longer_than_training(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(Exception, match=r"schedule.warmup=6: must be smaller than train.steps \(6\)"):
        make_recipe("schedule.warmup=6")


def test_only_matrices_decay(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    model = build_model(recipe.model, inputs_of(recipe))
    decayed, spared = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def names_of(group: dict[str, Any]) -> set[str]:
        return {names[id(parameter)] for parameter in group["params"]}

    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert names_of(decayed) | names_of(spared) == set(names.values())
    assert not names_of(decayed) & names_of(spared)
    assert all(not name.endswith("bias") and "norm" not in name for name in names_of(decayed))
    assert {name for name in names.values() if name.endswith("bias") or "norm" in name} <= names_of(spared)
    assert model.no_weight_decay() <= names_of(spared)  # type: ignore[operator]


def test_frozen_parameters_are_nobodys(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    model = build_model(recipe.model, inputs_of(recipe))
    frozen = next(model.parameters()).requires_grad_(False)
    assert all(frozen is not p for group in parameter_groups(model, 0.1) for p in group["params"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (Optimizer(lr=0.1), torch.optim.AdamW),
        (Optimizer(lr=0.1, name="adam", betas=(0.5, 0.6), eps=1e-6), torch.optim.Adam),
        (Optimizer(lr=0.1, name="sgd", momentum=0.7), torch.optim.SGD),
    ],
)
def test_optimizers_take_the_recipes_numbers(settings: Optimizer, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), settings)
    assert type(optimizer) is kind
    defaults = optimizer.defaults
    assert defaults["lr"] == 0.1
    if settings.name == "sgd":
        assert defaults["momentum"] == 0.7
    else:
        assert (defaults["betas"], defaults["eps"]) == (settings.betas, settings.eps)


def test_a_warm_up_in_epochs(make_recipe: Callable[..., Recipe]) -> None:
    """Of the first source of the mixture: 24 clips, 8 in a step."""
    recipe = make_recipe("schedule={warmup_epochs: 1.5}", "train.steps=9")
    schedule = resolve_schedule(recipe, {"motion": 24, "digits": 96})
    assert (schedule.warmup, schedule.warmup_epochs, schedule.name) == (round(1.5 * 24 / 8), None, "cosine")
    rates = [learning_rate(step, base=1.0, steps=9, schedule=schedule) for step in range(9)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 > rates[5]
    with pytest.raises(RecipeError, match=r"4.0 epochs of motion are 12 steps, and the training has 9"):
        resolve_schedule(
            make_recipe("schedule={warmup_epochs: 4}", "train.steps=9"), {"motion": 24, "digits": 1}
        )
    with pytest.raises(RecipeError, match="said beside `warmup_epochs`"):
        make_recipe("schedule={warmup: 2, warmup_epochs: 1}")
    steps = make_recipe("schedule={warmup: 3}")
    assert resolve_schedule(steps, {"motion": 24, "digits": 96}) == steps.schedule
