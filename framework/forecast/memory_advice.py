"""What to say when a GPU's memory does not suffice: what was needed, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from framework.errors import TrainingStopped
from framework.forecast.footprint import Memory
from framework.recipe.schema import Recipe
from framework.world import World

__all__ = ["explain_memory", "memory_explained"]

GIB = 2**30


@contextmanager
def memory_explained(recipe: Recipe, world: World, device: torch.device) -> Iterator[None]:
    """Inside, turn the device's out-of-memory error into one that says what would fit.

    Errors:
        TrainingStopped: the device ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        text = explain_memory(recipe, world.size, capacity)
        raise TrainingStopped(f"rank {world.rank} ran out of memory on {device}. {text}") from error


def explain_memory(recipe: Recipe, world: int, capacity: int) -> str:
    """What a rank needs by estimate, and which settings fit into `capacity` bytes."""
    memory = Memory(recipe)
    need = memory.footprint(world)
    states = need.total - need.activations - need.pixels
    micro = {
        name: count // (world * recipe.train.accumulation) for name, count in recipe.data.mixture.items()
    }
    samples = ", ".join(f"{name}: {count}" for name, count in micro.items())
    ways = [
        f"{'train.activation_checkpointing=true, ' if checkpointing else ''}train.accumulation={accumulation}"
        for checkpointing in sorted({recipe.train.activation_checkpointing, True})
        if (accumulation := _accumulation_that_fits(recipe, memory, world, capacity, checkpointing))
    ]
    if not ways:
        ways = [
            "no micro-batch at all: share the states out (engine.zero: 3, more ranks) or take engine.offload"
        ]
    return (
        f"A micro-batch of {samples} needs about {need.total / GIB:.1f} GiB of {capacity / GIB:.1f} "
        f"({states / GIB:.1f} for weights, gradients and optimizer, "
        f"{(need.activations + need.pixels) / GIB:.1f} for activations and pixels, the rest for libraries). "
        f"What would fit, by estimate: {'; or '.join(ways)}"
    )


def _accumulation_that_fits(
    recipe: Recipe, memory: Memory, world: int, capacity: int, checkpointing: bool
) -> int | None:
    """The smallest number of micro-batches a step that divides the mixture and fits; None: none does."""
    largest = memory.largest_micro_batch(world, capacity, checkpointing=checkpointing)
    samples, smallest = recipe.data.samples.values(), min(recipe.data.mixture.values())
    for accumulation in range(1, min(samples) // world + 1):
        divides = all(count % (world * accumulation) == 0 for count in samples)
        if divides and smallest // (world * accumulation) <= largest:
            return accumulation
    return None
