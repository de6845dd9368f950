"""The framework's own training step on random pixels; recipe, engine and micro-step are those of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from framework.forecast.footprint import Memory
from framework.forecast.forecast import step_operations
from framework.models.describe import describe_recipe
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.training.engine import start_engine
from framework.training.meters import Meters
from framework.training.step import micro_step
from framework.world import World

__all__ = ["TOKENS", "Case", "Product", "Setting"]

TOKENS = {539: ("paper", 32), 735: ("paper_dense", 32), 1176: ("paper", 64)}
"""Tokens of a clip, and the named tubes and frames that make so many (docs/published.md)."""

TINY = ("model.width=64", "model.depth=2", "model.heads=2", "engine.precision=fp32")


@dataclass(frozen=True)
class Case:
    """One training step to measure."""

    size: str
    """b, l or h."""
    tokens: int
    batch: int
    joint: bool = False
    """As many images as clips go along."""
    compile: bool = False
    checkpointing: bool = False
    offload: bool = False
    scale_up: int | None = None
    """With the gate of the scale-up stage, and so many frozen layers."""

    @property
    def name(self) -> str:
        """In words."""
        words = [f"{self.size.upper()} {self.tokens} tokens x {self.batch}"]
        marks = ("joint", "compile", "checkpointing", "offload")
        words += [mark for mark in marks if getattr(self, mark)]
        if self.scale_up is not None:
            words.append(f"{self.scale_up} layers frozen")
        return ", ".join(words)


@dataclass(frozen=True)
class Setting:
    """Where cases run."""

    device: torch.device
    tiny: bool = False

    def recipe(self, case: Case) -> Recipe:
        """The recipe of a case: that of the paper's run, with the case's batch on one rank."""
        tubes, frames = TOKENS[case.tokens]
        base = "tubevit_h_scaleup_k400" if case.scale_up is not None else f"tubevit_{case.size}_k400_in1k"
        mixture = f"{{k400: {case.batch}, in1k: {case.batch}}}" if case.joint else f"{{k400: {case.batch}}}"
        overrides = [
            f"model.tube_set={tubes}",
            f"data.sources.k400.clip.frames={frames}",
            f"data.mixture={mixture}",
            "engine.zero=1",
            f"engine.offload={'optimizer' if case.offload else 'none'}",
            "train.accumulation=1",
            "train.ema_decay=null",
            f"train.compile={str(case.compile).lower()}",
            f"train.activation_checkpointing={str(case.checkpointing).lower()}",
        ]
        if case.scale_up is not None:
            overrides.append(f"model.scale_up.frozen_layers={case.scale_up}")
        if self.tiny:
            overrides += [*TINY, *(["model.scale_up.tube_width=32"] if case.scale_up is not None else [])]
        return load_recipe(base, overrides).recipe

    def fitting_batch(self, case: Case, memory: int, most: int) -> int:
        """A batch that fills the device: at most so many tokens, and at most half of its memory."""
        room = Memory(self.recipe(case)).largest_micro_batch(1, memory // 2, checkpointing=case.checkpointing)
        batch = max(1, min(room, most // case.tokens))
        return batch if batch < 8 else batch // 8 * 8


class Product:
    """An engine for a case, and calls to time."""

    def __init__(self, setting: Setting, case: Case) -> None:
        self._device = setting.device
        self.recipe = setting.recipe(case)
        self.case = case
        torch.manual_seed(0)
        with setting.device:
            model = build_model(self.recipe.model, inputs_of(self.recipe))
        model.activation_checkpointing = case.checkpointing  # type: ignore[assignment]
        self.engine: Any = start_engine(model, self.recipe, World())
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 1e-5
        targets = {name: self.recipe.data.sources[name].targets for name in self.recipe.data.mixture}
        self._meters = Meters(targets, setting.device)
        self._batches = [self._batch(seed) for seed in range(2)]
        self._turn = 0

    def step(self) -> None:
        """Forward, backward and update, as in training."""
        batch = self._next()
        loss = micro_step(self.engine, batch, self.recipe.data.sources, self._device, self._meters)
        self.engine.backward(loss)
        self.engine.step()

    @torch.no_grad()
    def forward(self) -> dict[str, Tensor]:
        """The forward pass alone."""
        groups = self._next().groups
        return self.engine.module({name: group.pixels for name, group in groups.items()})

    def close(self) -> None:
        """Let go of the engine's memory."""
        self.engine.destroy()
        del self.engine, self._batches

    def _next(self) -> Any:
        """Batches take turns, so that caches do not hold the one that is read."""
        self._turn += 1
        return self._batches[self._turn % len(self._batches)]

    def _batch(self, seed: int) -> Any:
        generator = torch.Generator(self._device).manual_seed(seed)
        groups = {}
        for name, count in self.recipe.data.mixture.items():
            spec = inputs_of(self.recipe)[name]
            shape = (count, 3, spec.frames, spec.size, spec.size)
            draw = _drawer(generator, self._device)
            groups[name] = SimpleNamespace(
                pixels=draw(256, shape, torch.uint8),
                labels=draw(spec.classes, (count,), torch.int64),
                seeds=torch.arange(seed * count, (seed + 1) * count, pin_memory=self._device.type == "cuda"),
            )
        return cast(Any, SimpleNamespace(groups=groups))


def _drawer(generator: torch.Generator, device: torch.device) -> Callable[..., Tensor]:
    def draw(below: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device, dtype=dtype)

    return draw


def operations(recipe: Recipe, *, training: bool) -> float:
    """Floating-point operations of a case: 2 per multiply-add; a step counts three forward passes.

    Frozen layers count their forward pass alone, and nothing that is computed twice counts twice.
    """
    described = describe_recipe(recipe)
    samples = {name: float(count) for name, count in recipe.data.mixture.items()}
    if not training:
        return sum(described["cost"][name]["flop"] * 1e9 * count for name, count in samples.items())
    plain = recipe.train.model_copy(update={"activation_checkpointing": False})
    return step_operations(recipe.model_copy(update={"train": plain}), described, samples)
