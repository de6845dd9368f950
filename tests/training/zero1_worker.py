"""What `test_zero1` lets two ranks do: the same steps by DeepSpeed's own class and by `Zero1`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.training.distributed import start_process_group
from framework.training.engine import deepspeed_config, start_engine
from framework.world import World

STEPS, WIDTH = 5, 33
"""An odd width: the flat tensors end with padding on the last rank."""


class Three(nn.Module):
    """Two layers that are used, one that gets a gradient in some steps, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.seldom, self.never = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, values: Tensor, all_parts: bool) -> Tensor:
        values = self.second(torch.tanh(self.first(values)))
        return self.seldom(values) if all_parts else values


class Names(TorchDispatchMode):
    """The operators that run inside, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def run_steps(recipe: Recipe, world: World) -> dict[str, Any]:
    """Losses, norms, what was applied, and the weights at the end; a gradient is infinite in step 2."""
    torch.manual_seed(0)
    engine = start_engine(Three(), recipe, world)
    found: dict[str, Any] = {"class": type(engine.optimizer).__name__, "norms": [], "applied": []}
    accumulation = recipe.train.accumulation
    draws = torch.Generator().manual_seed(world.rank)
    for step in range(STEPS):
        for micro in range(accumulation):
            values = torch.randn(8, WIDTH, generator=draws).bfloat16()
            loss = engine(values, step % 2 == 0 and micro == 0).float().square().mean()
            engine.backward(loss * torch.inf if step == 2 and world.rank == 1 else loss)
            with Names() as names:
                engine.step()
            found["names"] = names.names
        found["norms"].append(float(engine.get_global_grad_norm()))
        found["applied"].append(engine.was_step_applied())
    states = engine.optimizer.optimizer.state.values()
    found["adam_steps"] = [float(state["step"]) for state in states]
    found["weights"] = {name: p.float().flatten().tolist() for name, p in engine.module.named_parameters()}
    found["masters"] = [flat.tolist() for flat in engine.optimizer.fp32_groups_flat_partition]
    return found


def compare(recipe_file: str, folder: str, cases: dict[str, tuple[str, ...]]) -> int:
    """Run all cases in both ways and leave what this rank found as JSON."""
    world = World.from_env() or World()
    start_process_group(world, torch.device("cpu"))
    results = {}
    for case, overrides in cases.items():
        recipe = load_recipe(recipe_file, ("engine.precision=bf16", *overrides)).recipe
        # theirs would sum over the ranks in bf16
        told = {**deepspeed_config(recipe, world), "communication_data_type": "fp32"}
        with (
            patch("framework.training.zero1.take_over"),
            patch("framework.training.engine.deepspeed_config", return_value=told),
        ):
            theirs = run_steps(recipe, world)
        results[case] = {"theirs": theirs, "ours": run_steps(recipe, world)}
    (Path(folder) / f"rank-{world.rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    return 0
