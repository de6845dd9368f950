"""A step asks the device for nothing: on tensors without values, every question to one is an error."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_curve import Alone
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.model_sections import reconstructs
from framework.recipe.schema import Recipe
from framework.training.guards import DeadGuard
from framework.training.meters import Meters
from framework.training.numbers import StepNumbers
from framework.training.step import micro_step

DEVICE = torch.device("meta")
JOINT = "tubevit_b_k400_in1k"
CASES = {
    "joint": (JOINT, "data.mixture={k400: 2, in1k: 2}"),
    "all noise": (
        JOINT,
        "data.mixture={k400: 2, in1k: 2}",
        "model.dropout=0.1",
        "model.stochastic_depth=0.1",
        "data.sources.k400.mixup=0.3",
        "train.activation_checkpointing=true",
    ),
    "scale-up": ("tubevit_h_scaleup_k400", "data.mixture={k400: 2}"),
}


class Blocking(TorchDispatchMode):
    """Writes down the copies between host and device that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "_copy_from") and not _asynchronous(args, kwargs or {}):
            ends = [value for value in (*args, result) if isinstance(value, Tensor)]
            if len({value.device.type for value in ends}) > 1:
                self.copies.append(f"{name} of {tuple(result.shape)}")
        return result


def _asynchronous(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


def batch_of(recipe: Recipe) -> Any:
    """Pixels and labels on the device, seeds on the host, as the copying thread hands them over."""
    groups = {}
    for name, count in recipe.data.mixture.items():
        spec = inputs_of(recipe)[name]
        shape = (count, 3, spec.frames, spec.size, spec.size)
        groups[name] = SimpleNamespace(
            pixels=torch.empty(shape, dtype=torch.uint8, device=DEVICE),
            labels=torch.empty(count, dtype=torch.int64, device=DEVICE),
            seeds=torch.arange(count),
            index=torch.arange(count),
        )
    return SimpleNamespace(groups=groups)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_wait_for_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    recipe = load_recipe(CASES[case][0], CASES[case][1:]).recipe
    with DEVICE:
        model = build_model(recipe.model, inputs_of(recipe)).bfloat16()
    model.activation_checkpointing = recipe.train.activation_checkpointing  # type: ignore[assignment]
    sources = recipe.data.sources
    blind = reconstructs(recipe.model)
    meters = Meters({name: None if blind else sources[name].targets for name in recipe.data.mixture}, DEVICE)
    guard = DeadGuard(model, recipe)
    numbers = StepNumbers(DEVICE, 3)  # one more than are fed: the last one's loss goes to the host

    def step() -> None:
        micro_step(Alone(model), batch_of(recipe), sources, DEVICE, meters, numbers).backward()  # type: ignore[arg-type]

    step()  # positions are made once, on the host
    with Blocking() as blocking:
        step()
    guard.step_done()
    assert blocking.copies == []
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_what_waits_is_found() -> None:
    """The test above could fail."""
    loss = torch.zeros((), device=DEVICE)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
    with Blocking() as blocking:
        torch.zeros(3).to(DEVICE)
        torch.zeros(3).to(DEVICE, non_blocking=True)
    assert blocking.copies == ["_to_copy of (3,)"]
