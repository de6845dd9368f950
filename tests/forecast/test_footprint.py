"""Memory is counted as autograd really keeps it, and as ZeRO shares it out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framework.errors import TrainingStopped
from framework.forecast.footprint import (
    Memory,
    fake_model,
    saved_bytes,
    state_bytes,
)
from framework.forecast.memory_advice import explain_memory, memory_explained
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.schema import Engine, Recipe
from framework.world import World

SMALL = (
    "model.width=64",
    "model.depth=3",
    "model.heads=2",
    "data.sources.k400.size=96",
    "data.sources.in1k.size=96",
    "data.sources.k400.clip.frames=32",
    "engine.precision=fp32",
)


def small(*overrides: str) -> Recipe:
    return load_recipe("tubevit_b_k400_in1k", (*SMALL, *overrides)).recipe


def really_kept(recipe: Recipe, source: str, samples: int, checkpointing: bool = False) -> int:
    """Bytes of distinct storages that a real forward pass on real memory saves."""
    model = build_model(recipe.model, inputs_of(recipe))
    model.activation_checkpointing = checkpointing  # type: ignore[assignment]
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    spec = inputs_of(recipe)[source]
    pixels = torch.randint(256, (samples, 3, spec.frames, spec.size, spec.size), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model({source: pixels}, {source: torch.arange(samples)})
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("source", ["k400", "in1k"])
def test_saved_bytes_are_those_of_a_real_pass(source: str) -> None:
    recipe = small("model.stochastic_depth=0.1")
    assert saved_bytes(recipe, checkpointing=False)[source] == pytest.approx(
        really_kept(recipe, source, 6) / 6, rel=0.02
    )


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block() -> None:
    recipe = small()
    plain, repeated = (
        saved_bytes(recipe, checkpointing=checkpointing)["k400"] for checkpointing in (False, True)
    )
    blocks = recipe.model.depth or 0
    assert really_kept(recipe, "k400", 2, True) / 2 < repeated < plain
    assert repeated - plain / blocks == pytest.approx(really_kept(recipe, "k400", 2, True) / 2, rel=0.02)


def test_more_layers_and_samples_keep_proportionally_more() -> None:
    three, six = (saved_bytes(small(f"model.depth={depth}"), checkpointing=False)["k400"] for depth in (3, 6))
    nine = saved_bytes(small("model.depth=9"), checkpointing=False)["k400"]
    assert six - three == pytest.approx(nine - six)
    both = Memory(small("data.mixture={k400: 8, in1k: 8}")).footprint(1).activations
    assert Memory(small("data.mixture={k400: 16, in1k: 16}")).footprint(1).activations == pytest.approx(
        2 * both
    )


def test_a_frozen_prefix_keeps_nothing() -> None:
    recipe = load_recipe("tubevit_h_scaleup_k400", ("model.scale_up.frozen_layers=24",)).recipe
    full = load_recipe("tubevit_h_scaleup_k400", ("model.scale_up.frozen_layers=0",)).recipe
    ratio = saved_bytes(recipe, checkpointing=False)["k400"] / saved_bytes(full, checkpointing=False)["k400"]
    assert ratio == pytest.approx(8 / 32, abs=0.03)


def test_zero_shares_out_what_its_stages_say() -> None:
    model = fake_model(small("engine.precision=bf16"))
    total = sum(parameter.numel() for parameter in model.parameters())

    def states(**engine: object) -> tuple[int, ...]:
        return state_bytes(model, Engine.model_validate(engine), 4, "adamw", True)

    assert states(zero=1) == (2 * total, 4 * total, 12 * total // 4, total), "fp32 sums of all gradients"
    assert states(zero=1, offload="optimizer") == (2 * total, 2 * total, 0, 0)
    assert states(zero=2) == (2 * total, 2 * total // 4, 16 * total // 4, total)
    assert states(zero=3) == (2 * total // 4, 2 * total // 4, 16 * total // 4, total)
    assert states(zero=0, precision="fp32") == (4 * total, 4 * total, 8 * total, 4 * total)
    assert states(zero=3, offload="all") == (0, 2 * total // 4, 0, 0)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    capacity = 2 * 10**9
    largest = Memory(small()).largest_micro_batch(1, capacity, checkpointing=False)

    def need(count: int) -> int:
        return Memory(small(f"data.mixture={{k400: {count}, in1k: {count}}}")).footprint(1).total

    assert need(largest) <= 0.95 * capacity < need(largest + 1)


def test_out_of_memory_says_what_would_fit() -> None:
    recipe = small("data.mixture={k400: 512, in1k: 512}")
    need = Memory(recipe).footprint(1)
    growing = need.activations + need.pixels
    text = explain_memory(recipe, 1, round((need.total - growing + growing / 3) / 0.95))
    assert "k400: 512" in text
    assert "What would fit, by estimate: train.accumulation=4" in text
    assert "train.activation_checkpointing=true, train.accumulation=" in text
    assert "no micro-batch at all" in explain_memory(recipe, 1, 10**6)


def test_the_devices_error_becomes_ours() -> None:
    recipe = small()
    with pytest.raises(TrainingStopped, match=r"rank 1 ran out of memory on cpu\. A micro-batch of"):  # noqa: SIM117
        with memory_explained(recipe, World(1, 2, 1, 2), torch.device("cpu")):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="other"):  # noqa: SIM117
        with memory_explained(recipe, World(), torch.device("cpu")):
            raise RuntimeError("other")
