"""The description of ViT, ViViT, TimeSformer, VideoMAE and MTV, whose tokens all come from tubelets.

Its keys are those of `describe` that make sense here; `parameter_groups` has the parts of the model by their
names, `encoder_parameters` is everything but the classifiers, and the keys of the recipe's `model` section
stand beside the numbers of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group
from torch import nn

from framework.models.inputs import InputSpec
from framework.models.mtv import MTV
from framework.models.tables import clip_in_words, plain_table
from framework.models.video_model import VideoModel
from framework.models.work import Work
from framework.recipe.schema import Model, Recipe

__all__ = ["cost_of", "describe_video_model", "video_tables"]


def describe_video_model(
    recipe: Recipe, model: VideoModel | MTV, inputs: Mapping[str, InputSpec]
) -> dict[str, Any]:
    """Describe the model of a checked recipe; plain values only, ready for JSON."""
    assert not isinstance(recipe.model, Model)
    groups = {name: _count(part) for name, part in model.named_children() if _count(part)}
    heads = {name: _count(head) for name, head in model.heads.items()} if "heads" in groups else {}
    total = sum(groups.values())
    sources = {name: _describe_source(model, spec) for name, spec in inputs.items()}
    options = recipe.model.model_dump(mode="json", exclude={"name", "width", "depth", "heads", "mlp_width"})
    return {
        "name": recipe.model.name,
        **asdict(model.size),
        **options,
        "tokens": {name: source["tokens"] for name, source in sources.items()},
        "parameters": total,
        "encoder_parameters": total - sum(heads.values()),
        "parameter_groups": {**groups, "heads": heads},
        "cost": {name: source["cost"] for name, source in sources.items()},
        "sources": sources,
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _describe_source(model: VideoModel | MTV, spec: InputSpec) -> dict[str, Any]:
    readers = [model] if isinstance(model, VideoModel) else model.readers
    return {
        **{key: value for key, value in asdict(spec).items() if key != "heads" or value},
        "tokens": model.sequence_length(spec),
        "grids": [
            {"tubelet": list(reader.tube.kernel), "shape": list(reader.shape_of(spec))} for reader in readers
        ],
        "cost": cost_of(model.work(spec)),
    }


def cost_of(work: Work) -> dict[str, float]:
    """The three ways of counting, in 1e9."""
    return {
        "mac": work.multiply_adds / 1e9,
        "hlo_half": work.published / 1e9,
        "flop": work.flops / 1e9,
    }


def video_tables(description: dict[str, Any]) -> Group:
    """The description as tables for a terminal."""
    size = "{name}: width {width}, depth {depth}, {heads} heads, MLP {mlp_width}".format(**description)
    parameters = plain_table("parameters", "number")
    parameters.add_row("total", f"{description['parameters']:,}")
    groups = dict(description["parameter_groups"])
    heads = groups.pop("heads")
    for name, count in (
        *groups.items(),
        *((f"classifier of {name}", count) for name, count in heads.items()),
    ):
        parameters.add_row(name.replace("_", " "), f"{count:,}")
    costs = ("GMAC\n", "GFLOP\n(2 per MAC)", "GFLOP\nas published")
    sources = plain_table("source", "clip", "classes", "tokens", *costs)
    grids = plain_table("tubelet", *(f"grid of\n{name}" for name in description["sources"]))
    for number, grid in enumerate(next(iter(description["sources"].values()))["grids"]):
        shapes = (_times(source["grids"][number]["shape"]) for source in description["sources"].values())
        grids.add_row(_times(grid["tubelet"]), *shapes)
    for name, source in description["sources"].items():
        cost = [f"{source['cost'][key]:.4g}" for key in ("mac", "flop", "hlo_half")]
        sources.add_row(name, clip_in_words(source), str(source["classes"]), str(source["tokens"]), *cost)
    return Group(size, parameters, grids, sources)


def _times(numbers: list[int]) -> str:
    return "x".join(map(str, numbers))
