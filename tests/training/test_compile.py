"""Compiled blocks train as the others do, in one graph, and evaluation compiles nothing more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import start_training, train_to_end

from framework.errors import RecipeError
from framework.models.registry import build_model, inputs_of
from framework.recipe.schema import Recipe
from framework.tracking.journal import read_journal
from framework.training.engine import compile_blocks
from framework.training.guards import DeadGuard


@pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="needs a C++ compiler; test_tubevit compiles the same blocks without one",
)
def test_losses_are_those_of_the_plain_model(recipe_file: Path, shards: Path, tmp_path: Path) -> None:
    common = ("train.steps=4", "train.eval_every=2", "evaluation.temporal_views=2")
    held_out = f"data.sources.motion.validation={shards}/val"
    train_to_end(recipe_file, tmp_path / "plain", 1, *common, held_out)
    job = start_training(recipe_file, tmp_path / "compiled", 1, *common, held_out, "train.compile=true")
    assert job.wait(300) == [0], job.said()[-3000:]
    assert "recompile_limit" not in job.said()
    expected, found = (read_metrics(tmp_path / name) for name in ("plain", "compiled"))
    assert {"train/loss", "train/grad_norm", "eval/motion/loss"} <= expected.keys()
    for key, values in expected.items():
        if key.startswith("eval/") or key in ("train/loss", "train/grad_norm"):
            assert found[key] == pytest.approx(values, rel=1e-4), key


def read_metrics(run: Path) -> dict[str, dict[int, float]]:
    """The values of every metric by step."""
    metrics: dict[str, dict[int, float]] = {}
    for entry in read_journal(run):
        for key, value in entry.metrics.items():
            metrics.setdefault(key, {})[entry.step] = value
    return metrics


def test_zero_3_does_not_go_with_it(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"train.compile.*engine.zero: 3"):
        make_recipe("engine.zero=3", "train.compile=true")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_blocks_are_one_graph_in_all_steps(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Whatever the block, the step and what watches the gradients; without a code generator."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend=count))
    recipe = make_recipe("model.depth=5", "model.dropout=0.1")
    model = build_model(recipe.model, inputs_of(recipe)).bfloat16()
    model.activation_checkpointing = checkpointing  # type: ignore[assignment]
    compile_blocks(model)
    guard = DeadGuard(model, recipe)
    for step in range(3):
        pixels = {
            name: torch.randint(256, (4, 3, spec.frames, 16, 16)) for name, spec in model.inputs.items()
        }  # type: ignore[union-attr,operator]
        pixels = {name: values.to(torch.uint8) for name, values in pixels.items()}
        logits = model(pixels, {name: torch.arange(4) + 4 * step for name in pixels})
        sum(values.square().mean() for values in logits.values()).backward()  # type: ignore[union-attr]
        if step == 1:
            guard._end()
    torch.compiler.reset()
    assert len(graphs) == 1
