"""`tubeworks describe RECIPE --hardware GPU`: a forecast as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from framework.data.plan import check_shares
from framework.errors import RecipeError
from framework.forecast.decode import local_decode_costs
from framework.forecast.forecast import Surroundings, forecast, parse_decode_ms
from framework.forecast.hardware import find_hardware
from framework.models.registry import model_names
from framework.recipe import load_recipe
from framework.wording import counted

__all__ = ["forecast_command"]

GB = 1e9


def forecast_command(
    recipe_name: str,
    overrides: Sequence[str],
    hardware: str,
    *,
    nodes: int,
    gpus_per_node: int,
    decode_ms: Sequence[str],
    as_json: bool,
) -> None:
    """Write the forecast of a recipe to the standard output.

    Errors:
        RecipeError: of the recipe, of the hardware, or a mixture that so many ranks cannot share.
    """
    if recipe_name in model_names():
        raise RecipeError(
            f"{recipe_name} is a model, and --hardware forecasts a run of a recipe: "
            "`tubeworks recipe list` names those that are installed"
        )
    recipe = load_recipe(recipe_name, overrides).recipe
    chip, said = find_hardware(hardware), parse_decode_ms(list(decode_ms), recipe)
    check_shares(recipe.data.mixture, nodes * gpus_per_node, recipe.train.accumulation, recipe.data.repeats)
    measured = local_decode_costs(recipe)
    around = Surroundings(nodes, gpus_per_node, measured | said, frozenset(measured.keys() - said.keys()))
    found = forecast(recipe, chip, around)
    console = Console()
    if as_json:
        console.out(json.dumps(found, indent=2), highlight=False)
        return
    console.print(_table(found))
    console.print(f"[dim]GPU: {found['hardware']['source']}[/dim]", highlight=False)


def _table(found: dict[str, Any]) -> Table:
    nodes = counted(found["nodes"], "node")
    head = f"{found['recipe']} on {found['gpus']} x {found['hardware']['name']}, {nodes}"
    result = Table(title=head, box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    for label, text in _lines(found):
        result.add_row(label, text)
    return result


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    times, decode, memory, share = (found[key] for key in ("times", "decode", "memory", "share"))
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in found["samples_per_s"].items())
    parts = ", ".join(f"{name} {_short(seconds * 1e3)}" for name, seconds in times.items())
    costs = ", ".join(f"{name} {value:.3g} {decode['origin'][name]}" for name, value in decode["ms"].items())
    micro = ", ".join(f"{name} {count}" for name, count in memory["micro_batch"].items())
    states = memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["average"]
    largest = "{plain} plain, {checkpointed} with activation checkpointing".format(**memory["largest"])
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    return [
        ("step", f"{_short(found['step_s'] * 1e3)} ms"),
        ("of which, each alone (ms)", parts),
        ("bottleneck", _advice(found)),
        ("samples a second", rates),
        ("whole run", f"{_short(found['hours'])} h, {_short(found['gpu_hours'])} GPU-hours"),
        ("share of the matrix rate", f"{share['value']:.0%}, {share['origin']}"),
        ("decode, processor ms a sample", costs),
        (
            "cores for decode, per GPU",
            f"{_short(decode['cores_per_gpu'])} ({counted(decode['workers_per_gpu'], 'worker')})",
        ),
        (
            "memory of a GPU",
            f"{_short(memory['total'] / GB)} of {_short(memory['capacity'] / GB)} GB: {verdict}",
        ),
        (
            "  states, activations, pixels",
            ", ".join(_short(value / GB) for value in (states, memory["activations"], memory["pixels"])),
        ),
        ("micro-batch", micro),
        ("largest that fits, of the smallest source", largest),
    ]


def _short(value: float) -> str:
    """Three digits: a tiny run has figures as well."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _advice(found: dict[str, Any]) -> str:
    name = found["bottleneck"]
    if name == "decode":
        wanted = found["decode"]["cores_per_gpu"]
        return f"decode: data.workers={wanted:.0f} with as many cores per GPU, or shards that cost less"
    return {
        "compute": "compute: the GPU, as it should be",
        "network": "network: larger micro-batches with accumulation, or fewer nodes",
        "copy": "copy: the host's link",
    }[name]
