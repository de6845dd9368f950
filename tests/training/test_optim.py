"""The learning rate by its formula, and who decays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from framework.models.registry import build_model, inputs_of
from framework.recipe.schema import Optimizer, Recipe, Schedule
from framework.training.optim import build_optimizer, learning_rate, parameter_groups


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
