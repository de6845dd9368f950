"""How long a recipe will take on some hardware, what it will wait for, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from framework.data.plan import check_shares
from framework.errors import RecipeError
from framework.forecast.footprint import Memory
from framework.forecast.hardware import Hardware
from framework.models.describe import describe_recipe
from framework.recipe.schema import Recipe, Source

__all__ = ["DECODE_MS", "Surroundings", "forecast", "parse_decode_ms", "step_operations"]

MEASURED, GIVEN, ESTIMATED = "measured here", "as said", "estimated"
"""Origins of what a sample costs to decode."""

DECODE_MS = {"frame": 1.05, "frame_randaugment": 0.75, "image": 8.0}
"""Processor milliseconds of a video frame from shard to pixels, RandAugment besides, and of an image.

The first two are of benchmarks/results/decode.md (340x256, a key frame every 32 frames); the last is assumed.
"""


@dataclass(frozen=True)
class Surroundings:
    """What is around the GPUs."""

    nodes: int = 1
    gpus_per_node: int = 8
    decode_ms: Mapping[str, float] | None = None
    """Processor milliseconds of one sample with all its views, by source; what is missing is estimated."""
    measured: frozenset[str] = frozenset()
    """Sources whose milliseconds were measured on this machine."""


def forecast(recipe: Recipe, hardware: Hardware, around: Surroundings) -> dict[str, Any]:
    """Predict a run; plain values only, ready for JSON.

    Times of a step, in seconds: `compute` (operations over the rate that steps reach), `copy` (pixels over
    the host's link), `network` (gradients and weights over the slowest link, as ZeRO sends them) and `decode`
    (processor time over the data workers). Compute and network follow one another, the others run beside.

    Errors:
        RecipeError: the mixture cannot be shared by these ranks.
    """
    world = around.nodes * around.gpus_per_node
    check_shares(recipe.data.mixture, world, recipe.train.accumulation, recipe.data.repeats)
    described = describe_recipe(recipe)
    share, origin = hardware.share(described["width"], described["depth"], _longest(described))
    milliseconds = {
        name: (around.decode_ms or {}).get(name, _decode_ms(source))
        for name, source in recipe.data.sources.items()
    }
    per_rank = {name: count / world for name, count in recipe.data.mixture.items()}
    decode = sum(milliseconds[name] * count / world for name, count in recipe.data.samples.items()) / 1e3
    operations = step_operations(recipe, described, per_rank)
    times = {
        "compute": operations / (hardware.matmul * share),
        "network": _sent_bytes(recipe, described, world)
        / (hardware.network if around.nodes > 1 else hardware.gpu_link),
        "copy": sum(_pixel_bytes(recipe.data.sources[n]) * count for n, count in per_rank.items())
        / hardware.host_link,
        "decode": decode / max(1, recipe.data.workers),
    }
    device = times["compute"] + times["network"]
    step = max(device, times["copy"], times["decode"])
    hours = recipe.train.steps * step / 3600
    memory = _memory(recipe, world, hardware)
    return {
        "recipe": recipe.name,
        "hardware": {"name": hardware.name, "source": hardware.source},
        "nodes": around.nodes,
        "gpus": world,
        "share": {"value": share, "origin": origin},
        "step_s": step,
        "times": times,
        "bottleneck": _bottleneck(times, step),
        "samples_per_s": {name: count / step for name, count in recipe.data.samples.items()},
        "decode": {
            "ms": milliseconds,
            "origin": {name: _origin(name, around) for name in milliseconds},
            "cores_per_gpu": decode / device,
            "workers_per_gpu": recipe.data.workers,
        },
        "hours": hours,
        "gpu_hours": hours * world,
        "memory": memory,
    }


def step_operations(recipe: Recipe, described: Mapping[str, Any], samples: Mapping[str, float]) -> float:
    """Floating-point operations of one step on so many samples: forward, and twice that backward.

    Frozen layers have no backward pass; activation checkpointing runs the others' forward pass once more.
    """
    forward = sum(described["cost"][name]["flop"] * 1e9 * count for name, count in samples.items())
    scale_up = recipe.model.scale_up
    trained = 1 - (scale_up.frozen_layers / described["depth"] if scale_up else 0)
    return forward * (1 + (2 + recipe.train.activation_checkpointing) * trained)


def _origin(name: str, around: Surroundings) -> str:
    """Where the milliseconds of a source come from."""
    if name in around.measured:
        return MEASURED
    return GIVEN if name in (around.decode_ms or {}) else ESTIMATED


def _longest(described: Mapping[str, Any]) -> int:
    return max(described["tokens"].values())


def _decode_ms(source: Source) -> float:
    """An estimate for a sample with all its views, of which nothing is taken to be shared."""
    if source.media == "image":
        return DECODE_MS["image"] * source.repeats
    frame = DECODE_MS["frame"] + (DECODE_MS["frame_randaugment"] if source.augment.randaugment else 0)
    return frame * source.frames * source.repeats


def _pixel_bytes(source: Source) -> int:
    return 3 * source.frames * source.size**2


def _sent_bytes(recipe: Recipe, described: Mapping[str, Any], world: int) -> float:
    """What a rank sends in a step: gradients are summed, then weights gathered; ZeRO-3 gathers them twice."""
    width = 2 if recipe.engine.precision == "bf16" else 4
    rounds = 3 if recipe.engine.zero == 3 else 2
    return described["parameters"] * width * rounds * (world - 1) / world


def _bottleneck(times: Mapping[str, float], step: float) -> str:
    if step == times["decode"]:
        return "decode"
    if step == times["copy"]:
        return "copy"
    return "network" if times["network"] > times["compute"] else "compute"


def _memory(recipe: Recipe, world: int, hardware: Hardware) -> dict[str, Any]:
    model_memory = Memory(recipe)
    need = model_memory.footprint(world)
    smallest = min(recipe.data.mixture.values())
    micro = smallest / (world * recipe.train.accumulation)
    plain, repeated = (
        model_memory.largest_micro_batch(world, hardware.memory, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    largest = repeated if recipe.train.activation_checkpointing else plain
    return {
        **asdict(need),
        "total": need.total,
        "capacity": hardware.memory,
        "fits": micro <= largest,
        "micro_batch": {
            name: count // (world * recipe.train.accumulation) for name, count in recipe.data.mixture.items()
        },
        "largest": {"plain": plain, "checkpointed": repeated},
    }


def parse_decode_ms(values: list[str], recipe: Recipe) -> dict[str, float]:
    """`source=milliseconds` of the command line.

    Errors:
        RecipeError: not of that form, or no such source.
    """
    parsed = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            parsed[name] = float(number)
        except ValueError as error:
            raise RecipeError(f"--decode-ms {value}: say SOURCE=MILLISECONDS, such as k400=35") from error
        if name not in recipe.data.sources:
            raise RecipeError(
                f"--decode-ms {value}: the recipe's sources are {', '.join(recipe.data.sources)}"
            )
        if not parsed[name] >= 0:
            raise RecipeError(f"--decode-ms {value}: must be 0 or more")
    return parsed
