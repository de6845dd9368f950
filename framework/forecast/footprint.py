"""Memory of one rank in training, counted without allocating it.

What the backward pass needs is counted by running the forward pass on fake tensors, which have shapes and
no memory, and adding up what autograd keeps. So it holds for every model, and follows every change of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from framework.models.inputs import InputSpec, inputs_of
from framework.models.registry import build_model
from framework.recipe.schema import Engine, Recipe

__all__ = ["Footprint", "Memory", "fake_model", "saved_bytes", "state_bytes"]

PROBE = 2
"""Samples of each source in the fake pass; what is kept grows in proportion to them."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of GPU memory of one rank, without what the allocator, NCCL and cuDNN take for themselves."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    pixels: int

    @property
    def total(self) -> int:
        """All together, at the end of the forward pass."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.pixels


class Memory:
    """What training a recipe takes on each rank; the model is looked at once, however often this is asked."""

    def __init__(self, recipe: Recipe) -> None:
        """Look at the recipe's model.

        Errors:
            RecipeError, ModelError: it cannot be built.
        """
        self._recipe = recipe
        self._model = fake_model(recipe)
        self._pixels = {name: 3 * spec.frames * spec.size**2 for name, spec in inputs_of(recipe).items()}
        self._saved = {
            checkpointing: saved_bytes(recipe, checkpointing=checkpointing) for checkpointing in (False, True)
        }

    def footprint(self, world: int) -> Footprint:
        """What a rank of so many needs, with the recipe's mixture and accumulation."""
        recipe = self._recipe
        parts = world * recipe.train.accumulation
        kept = self._saved[recipe.train.activation_checkpointing]
        mixture = recipe.data.mixture.items()
        return Footprint(
            *self._states(world),
            activations=round(sum(kept[name] * count / parts for name, count in mixture)),
            # one micro-batch more is on its way
            pixels=round(sum(2 * self._pixels[name] * count / parts for name, count in mixture)),
        )

    def largest_micro_batch(self, world: int, capacity: int, *, checkpointing: bool) -> int:
        """The most samples of the mixture's smallest source, with the others in proportion, that fit.

        A twentieth of `capacity` bytes is left to the allocator, NCCL and cuDNN. 0: not even one fits.
        """
        mixture = self._recipe.data.mixture
        kept, smallest = self._saved[checkpointing], min(mixture.values())
        one = sum((kept[name] + 2 * self._pixels[name]) * count / smallest for name, count in mixture.items())
        return max(0, int((0.95 * capacity - sum(self._states(world))) / one))

    def _states(self, world: int) -> tuple[int, int, int, int]:
        recipe = self._recipe
        average = recipe.train.ema_decay is not None
        return state_bytes(self._model, recipe.engine, world, recipe.optimizer.name, average)


def state_bytes(
    model: nn.Module, engine: Engine, world: int, optimizer: str, average: bool
) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer (with its fp32 weights) and moving average on one rank.

    ZeRO-1 shares out the optimizer, ZeRO-2 gradients too, ZeRO-3 also the weights (Rajbhandari et al., 2020,
    §5). In bf16 there is an fp32 copy of the weights that train, and gradients are summed in fp32 where the
    optimizer keeps them. Under ZeRO-1 every rank has the sums of all, and each gradient goes into them at
    once.
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    low = engine.precision == "bf16"
    share = {stage: world if engine.zero >= stage else 1 for stage in (1, 2, 3)}
    at_once = low and engine.zero == 1 and engine.offload == "none"
    width = 2 if low else 4
    weights = 0 if engine.offload == "all" else every * width // share[3]
    gradients = trained * (4 if at_once else width) // share[2]
    moments = 1 if optimizer == "sgd" else 2
    states = trained * 4 * (moments + low + (low and not at_once)) // share[1]  # fp32 weights, sums
    averages = trained * 4 // share[1] if average else 0
    if engine.offload != "none":
        states = averages = 0
    return weights, gradients, states, averages


def saved_bytes(recipe: Recipe, *, checkpointing: bool) -> dict[str, float]:
    """What autograd keeps for one sample of each source between the passes, in bytes.

    With activation checkpointing it includes what one block keeps while it is computed again.
    """
    model = fake_model(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        kept = {name: _kept(model, name, spec, checkpointing) for name, spec in inputs_of(recipe).items()}
        if checkpointing:
            blocks: int = len(model.blocks)  # type: ignore[arg-type]
            for name, spec in inputs_of(recipe).items():
                kept[name] += _kept(model, name, spec, False) / blocks
    return kept


def fake_model(recipe: Recipe) -> nn.Module:
    """The recipe's model without memory, in the precision that it trains in."""
    with torch.device("meta"):
        model = build_model(recipe.model, inputs_of(recipe))
    return model.bfloat16() if recipe.engine.precision == "bf16" else model


def _kept(model: nn.Module, name: str, spec: InputSpec, checkpointing: bool) -> float:
    """Bytes that the forward pass of one sample leaves to the backward pass, weights aside."""
    model.activation_checkpointing = checkpointing  # type: ignore[assignment]
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that its address stays its own
        return tensor

    pixels = {name: torch.zeros(PROBE, 3, spec.frames, spec.size, spec.size, dtype=torch.uint8)}
    seeds = {name: torch.zeros(PROBE, dtype=torch.int64)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(pixels, seeds)
    return sum(size for size, _ in kept.values()) / PROBE
