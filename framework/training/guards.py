"""Trainings that go wrong without an error: a model that has collapsed, and weights that nothing reaches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from framework.errors import TrainingStopped
from framework.recipe.model_sections import reconstructs
from framework.recipe.schema import Recipe, Source
from framework.training.distributed import Peers

__all__ = ["CollapseGuard", "DeadGuard"]

FLAT = 0.01
"""A loss so near ln(classes), relatively, is that of a model which does not look at its input."""
SIGMAS = 3.0
LOOK_AGAIN = 10_000
"""Steps between two looks for dead parameters."""


class CollapseGuard:
    """Ends a run whose loss stays at ln(classes) while its accuracy stays at chance (TubeViT appendix A).

    L and H trained with B's learning rate and weight decay: "accuracy dropped to 0 and the loss stayed flat".
    A source counts as collapsed when, over the last logging points after the warm-up, every loss lay within
    1 % of ln(classes), and no more samples were right than guessing gives, up to three standard deviations.
    With heads, ln(classes) is summed and chance is multiplied over them. A multi-label model that does not
    look at its input comes to the entropy of the classes' shares, and its best guess is the most frequent
    class; `shares` of the samples that have each class say where that is.
    """

    def __init__(self, recipe: Recipe, shares: Mapping[str, Sequence[float]] | None = None) -> None:
        self._points = recipe.guards.collapse
        self._warmup = recipe.schedule.warmup
        self._every = recipe.train.log_every
        self._samples = recipe.data.samples
        self._blind = {
            name: _blind(recipe.data.sources[name], (shares or {}).get(name))
            for name in recipe.data.mixture
            if recipe.data.sources[name].classes > 1
            and recipe.data.sources[name].loss_weight > 0
            and not reconstructs(recipe.model)
        }
        self._seen: dict[str, deque[tuple[float, float]]] = {
            name: deque(maxlen=self._points)
            for name, blind in self._blind.items()
            if self._points and blind.loss > 0
        }

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a logging point, which are the same on every rank.

        Errors:
            TrainingStopped: a source has collapsed.
        """
        if step <= self._warmup:
            return
        for name, seen in self._seen.items():
            blind = self._blind[name]
            seen.append((metrics[f"train/{name}/loss"], metrics[f"train/{name}/{blind.metric}"]))
            if len(seen) == self._points and self._collapsed(name, seen):
                raise TrainingStopped(self._message(name, step, seen[-1][0], metrics["train/lr"]))

    def state(self) -> dict[str, Any]:
        """Loss and accuracy of the last logging points, by source."""
        return {"seen": {name: list(seen) for name, seen in self._seen.items()}}

    def restore(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on from what every rank has seen, which is the same."""
        for name, points in states[0]["seen"].items():
            if name in self._seen:
                self._seen[name].extend((loss, hits) for loss, hits in points)

    def _message(self, name: str, step: int, loss: float, lr: float) -> str:
        blind = self._blind[name]
        return (
            f"source {name}: for {self._points} logging points up to step {step} the loss has stayed at "
            f"{loss:.4f}, where {blind.words} is {blind.loss:.4f}, and accuracy at chance: "
            f"the model has collapsed, or learns nothing, at learning rate {lr:.3g}. Lower optimizer.lr and "
            "optimizer.weight_decay (TubeViT, arXiv 2212.03229, appendix A: large models collapse with those "
            "of small ones), or raise schedule.warmup, and start a new --run. If that is right, raise "
            "guards.collapse; 0 turns it off"
        )

    def _collapsed(self, name: str, seen: deque[tuple[float, float]]) -> bool:
        floor, chance = self._blind[name].loss, self._blind[name].right
        count = self._samples[name] * self._every * len(seen)
        right = sum(top_1 for _, top_1 in seen) / len(seen)
        guessing = chance + SIGMAS * math.sqrt(chance * (1 - chance) / count)
        return right <= guessing and all(abs(loss - floor) <= FLAT * floor for loss, _ in seen)


@dataclass(frozen=True)
class _Blind:
    """Loss and accuracy of a model that does not look at its input, in words too."""

    loss: float
    right: float
    words: str
    metric: str = "top_1"


def _blind(source: Source, shares: Sequence[float] | None) -> _Blind:
    if source.target != "multi":
        sizes = source.targets.sizes
        loss, words = sum(map(math.log, sizes)), " + ".join(f"ln({size} classes)" for size in sizes)
        return _Blind(loss, 1 / math.prod(sizes), words)
    if not shares:
        return _Blind(0.0, 1.0, "", "hit_1")  # not to be told from a model that has learned
    smoothing = source.label_smoothing
    wanted = [(1 - smoothing) * share + smoothing / len(shares) for share in shares]
    entropies = [-sum(p * math.log(p) for p in (share, 1 - share) if p > 0) for share in wanted]
    return _Blind(sum(entropies) / len(shares), max(shares), "the entropy of the classes' shares", "hit_1")


class DeadGuard:
    """Ends a run in which a trainable tensor gets no gradient, or zeros alone, for many steps in a row.

    It looks during the first steps of an attempt and seldom afterwards. Meanwhile a flag per tensor stays on
    the device, so that no step waits for it.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._steps = recipe.guards.dead
        idle = {
            name
            for name, source in recipe.data.sources.items()
            if name not in recipe.data.mixture or source.loss_weight == 0
        }
        self._watched = {
            name: parameter
            for name, parameter in model.named_parameters()
            # the classifiers of sources that are not trained wait for their turn
            if parameter.requires_grad and not name.startswith(tuple(f"heads.{source}." for source in idle))
        }
        self._flags: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._done = 0
        if self._steps:
            self._begin()

    def step_done(self) -> None:
        """Count a step."""
        self._done += 1
        if self._steps and not self._handles and self._done >= LOOK_AGAIN:
            self._begin()

    def state(self) -> dict[str, Any]:
        """Steps since the look began or ended, and the tensors that this rank saw a gradient of."""
        reached = [name for name, flag in self._flags.items() if bool(flag)]
        return {"done": self._done, "watching": bool(self._handles), "reached": reached}

    def restore(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on with the look, or with the pause after it."""
        if not self._steps:
            return
        self._done = int(states[0]["done"])
        if not states[0]["watching"]:
            self._end()
        device = next(iter(self._watched.values())).device if self._watched else None
        for name in {name for state in states for name in state["reached"]} & self._watched.keys():
            self._flags[name] = torch.tensor(True, device=device)

    def look(self, step: int, peers: Peers) -> None:
        """At a logging point: if enough steps were watched, all ranks together find what got no gradient.

        Errors:
            TrainingStopped: names the tensors.
        """
        if not self._handles or self._done < self._steps:
            return
        nothing = next(iter(self._flags.values()), torch.tensor(False)).new_zeros(())
        reached = peers.sum(torch.stack([self._flags.get(name, nothing) for name in self._watched]))
        dead = [name for name, count in zip(self._watched, reached.tolist(), strict=True) if count == 0]
        watched, self._done = self._done, 0
        self._end()
        if dead:
            shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
            raise TrainingStopped(
                f"trainable, but without any gradient in {watched} steps up to step {step}: {shown}. Nothing "
                "that the run feeds reaches them (tubes for videos in a run on images, say): leave them out "
                "of `model`, or add what they read to data.mixture. If that is right, `guards.dead: 0` turns "
                "it off"
            )

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._flags = [], {}

    def _begin(self) -> None:
        self._done = 0
        self._handles = [
            parameter.register_hook(partial(self._mark, name)) for name, parameter in self._watched.items()
        ]

    def _mark(self, name: str, gradient: Tensor) -> None:
        found = (gradient != 0).any()
        known = self._flags.get(name)
        self._flags[name] = found if known is None else known | found
