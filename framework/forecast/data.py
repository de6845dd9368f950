"""What the data of a recipe ask for, before a GPU is allotted (`tubeworks data plan RECIPE --summary`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from framework.data.plan import Plan
from framework.data.prefetch import cache_needed, shard_bytes
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.data.windows import Spans, node_rows, simulate_fetches, spans_between
from framework.forecast.decode import decode_costs
from framework.forecast.forecast import ESTIMATED, MEASURED, Surroundings, forecast
from framework.forecast.hardware import Hardware
from framework.forecast.mixing import mixing_of, mixing_text
from framework.recipe.schema import Recipe
from framework.wording import counted, plural
from framework.world import World

__all__ = ["summarize_plan", "summary_text"]


def summarize_plan(
    recipe: Recipe, hardware: Hardware, *, nodes: int, gpus_per_node: int, measured: int
) -> dict[str, Any]:
    """Epochs, cores, cache, traffic and GPU-hours of a run; plain values only, ready for JSON.

    The processor time of a sample is measured here, over `measured` samples of each source (0: estimated).
    `cache` and `egress` are those of the first node: bytes that it must keep at a time, bytes that would keep
    all it needs in an epoch of its largest remote source, and what it fetches in the first such epoch with
    the recipe's data.cache.gib. They are None where all shards are on this machine.

    Errors:
        DataError: the shards cannot be opened or do not fit the recipe.
        RecipeError: a mixture that so many ranks cannot share.
    """
    sources = open_sources(recipe, "train")
    plan = build_plan(recipe, sources)
    world = World(0, nodes * gpus_per_node, 0, gpus_per_node)
    costs = decode_costs(recipe, sources, measured)
    predicted = forecast(recipe, hardware, Surroundings(nodes, gpus_per_node, costs, frozenset(costs)))
    return {
        "recipe": recipe.name,
        "plan": plan.hash,
        "steps": recipe.train.steps,
        "block": recipe.data.block,
        "nodes": nodes,
        "gpus": world.size,
        "sources": {name: _source(recipe, opened, plan) for name, opened in sources.items()},
        "decode_ms": {name: round(cost, 2) for name, cost in predicted["decode"]["ms"].items()},
        "decode_measured": sorted(costs),
        "cores_per_gpu": round(predicted["decode"]["cores_per_gpu"], 2),
        "cores_per_node": math.ceil(predicted["decode"]["cores_per_gpu"] * gpus_per_node),
        "step_s": predicted["step_s"],
        "bottleneck": predicted["bottleneck"],
        "gpu_hours": predicted["gpu_hours"],
        "assumed": {"hardware": predicted["hardware"], "share": predicted["share"]},
        **_traffic(recipe, sources, plan, world),
    }


def _source(recipe: Recipe, opened: OpenSource, plan: Plan) -> dict[str, Any]:
    steps = plan.steps_per_epoch(opened.name)
    return {
        "folder": str(opened.manifest.folder),
        "remote": opened.manifest.remote is not None,
        "samples": len(opened),
        "shards": len(opened.manifest.shards),
        "bytes": int(shard_bytes(opened).sum()),
        "samples_per_step": plan.counts[opened.name],
        "repeats": opened.source.repeats,
        "steps_per_epoch": steps,
        "epochs": recipe.train.steps / steps,
        "shuffle": mixing_of(recipe, opened, plan),
    }


def _traffic(recipe: Recipe, sources: Mapping[str, OpenSource], plan: Plan, world: World) -> dict[str, Any]:
    remote = {name: opened for name, opened in sources.items() if opened.manifest.remote}
    if not remote:
        return {"cache": None, "egress": None}
    sizes = {name: shard_bytes(opened) for name, opened in remote.items()}
    largest = max(remote, key=lambda name: int(sizes[name].sum()))
    steps = min(recipe.train.steps, math.ceil(plan.steps_per_epoch(largest)))
    spans: dict[str, Spans] = {
        name: spans_between(plan, name, node_rows(plan.counts[name], world), 0, steps) for name in remote
    }
    limit = round(recipe.data.cache.gib * 2**30)
    whole = sum(int(sizes[name][np.unique(one.shard)].sum()) for name, one in spans.items())
    return {
        "cache": {
            "least_bytes": cache_needed(recipe, sources, plan, world),
            "whole_bytes": whole,
            "limit_bytes": limit,
        },
        "egress": {
            "steps": steps,
            "node_bytes": simulate_fetches(spans, sizes, limit),
            "data_bytes": sum(int(one.sum()) for one in sizes.values()),
        },
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"{summary['recipe']}: {summary['steps']:,} steps on {counted(summary['gpus'], 'GPU')}, "
        f"{counted(summary['nodes'], 'node')}"
    ]
    for name, one in summary["sources"].items():
        lines.append(
            f"  {name}: {one['samples']:,} {plural('sample', one['samples'])}, {one['shards']:,} "
            f"{plural('shard', one['shards'])}, {_gib(one['bytes'])}; "
            f"{one['samples_per_step']} a step{_repeated(one['repeats'])}, "
            f"{one['steps_per_epoch']:,.1f} steps an epoch, "
            f"{one['epochs']:.2f} epochs"
        )
        lines += mixing_text(name, one["shuffle"], summary["block"])
    for name, cost in summary["decode_ms"].items():
        origin = MEASURED if name in summary["decode_measured"] else ESTIMATED
        lines.append(f"  decode {name}: {cost:g} ms of a core for a sample, {origin}")
    lines.append(f"  cores: {summary['cores_per_gpu']:g} a GPU, {summary['cores_per_node']} a node")
    if summary["cache"]:
        cache, egress = summary["cache"], summary["egress"]
        lines.append(
            f"  cache: {_gib(cache['least_bytes'])} a node at least, {_gib(cache['whole_bytes'])} to fetch "
            f"nothing twice; data.cache.gib allows {_gib(cache['limit_bytes'])}"
        )
        lines.append(
            f"  egress: {_gib(egress['node_bytes'])} a node in {egress['steps']:,} steps, of "
            f"{_gib(egress['data_bytes'])} of data"
        )
    share = summary["assumed"]["share"]
    lines.append(
        f"  GPU-hours: {summary['gpu_hours']:,.1f} ({summary['step_s']:.3g} s a step, bound by "
        f"{summary['bottleneck']}), on {summary['assumed']['hardware']['name']} at {share['value']:.0%} of "
        f"its rate ({share['origin']})"
    )
    return "\n".join(lines)


def _repeated(repeats: int) -> str:
    return f" with {repeats} views each" if repeats > 1 else ""


def _gib(count: float) -> str:
    return f"{count / 2**30:,.3g} GiB"
