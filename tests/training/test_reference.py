"""Two DeepSpeed ranks train as plain torch does: losses, clipping, schedule, parameter groups, averages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import journalled, train_to_end

from framework.data.loader import training_batches
from framework.data.sources import build_plan, open_sources
from framework.models.registry import build_model, inputs_of
from framework.recipe.schema import Recipe
from framework.training.checkpoint import load_weights, newest_valid
from framework.training.losses import cross_entropy, draw_mixing, mix_pixels
from framework.training.optim import build_optimizer, learning_rate
from framework.world import World

CASES = {
    "adamw": ("optimizer.clip=0.5",),
    "adam": ("optimizer.name=adam", "optimizer.clip=null", "engine.zero=2"),
    "sgd": ("optimizer.name=sgd", "optimizer.lr=0.01", "train.accumulation=2", "engine.zero=3"),
    "sgd without zero": ("optimizer.name=sgd", "optimizer.lr=0.01", "optimizer.clip=0.1", "engine.zero=0"),
}


def plain_training(recipe: Recipe) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of every step, and the moving averages at the end."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, inputs_of(recipe))
    optimizer = build_optimizer(model, recipe.optimizer)
    sources = open_sources(recipe)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, norms = [], []
    batches = training_batches(
        recipe, sources, build_plan(recipe, sources), World(), start_step=0, stop_step=recipe.train.steps
    )
    for batch in batches:
        pixels, seeds, mixings = {}, {}, {}
        for name, group in batch.groups.items():
            mixing = mixings[name] = draw_mixing(recipe.data.sources[name].mixup, group.seeds, name)
            pixels[name] = group.pixels if mixing is None else mix_pixels(group.pixels, mixing)
            seeds[name] = group.seeds
        logits = model(pixels, seeds)
        loss = torch.zeros(())
        for name, group in batch.groups.items():
            smoothing = recipe.data.sources[name].label_smoothing
            loss = loss + cross_entropy(logits[name], group.labels, smoothing, mixings[name])
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip or 1e9)))
        for part in optimizer.param_groups:
            part["lr"] = learning_rate(
                batch.step, base=recipe.optimizer.lr, steps=recipe.train.steps, schedule=recipe.schedule
            )
        optimizer.step()
        losses.append(float(loss.detach()))
        for name, parameter in model.named_parameters():
            averages[name].lerp_(parameter.detach(), 1 - (recipe.train.ema_decay or 0.0))
    return losses, norms, averages


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_like_plain_torch(
    recipe_file: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, case: str
) -> None:
    run = train_to_end(recipe_file, tmp_path / "run", 2, *CASES[case])
    losses, norms, averages = plain_training(
        make_recipe(*(text for text in CASES[case] if "accumulation" not in text))
    )
    steps = journalled(run)
    assert [steps[step]["train/loss"] for step in range(1, 7)] == pytest.approx(losses, rel=1e-5)
    assert [steps[step]["train/grad_norm"] for step in range(1, 7)] == pytest.approx(norms, rel=1e-4)
    saved = load_weights(newest_valid(run), ema=True)
    for name, average in averages.items():
        torch.testing.assert_close(saved[name], average, rtol=1e-4, atol=1e-4, msg=name)
