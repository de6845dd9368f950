"""What a model is, before it is trained: tubes, tokens, parameters and operations (`tubeworks describe`)."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table

from framework.errors import RecipeError
from framework.models.cost import count_parameters, forward_cost
from framework.models.inputs import InputSpec, inputs_of
from framework.models.registry import build_model, model_names
from framework.models.tubes import sub_stride
from framework.models.tubevit import TubeViT
from framework.recipe import Recipe, load_recipe, recipe_names

__all__ = ["describe", "describe_command", "describe_recipe", "table"]

# A model that is described by its name alone reads what the paper's joint training reads (§3.2, §3.5).
PAPER_INPUTS = """\
name: describe
model: {{name: {name}}}
data:
  sources:
    video: {{path: shards, kind: video, classes: 600, size: 224, clip: {{frames: 32, fps: 15}}}}
    image: {{path: shards, kind: image, classes: 1000, size: 224}}
  mixture: {{video: 1, image: 1}}
optimizer: {{lr: 1e-4}}
train: {{steps: 1}}
"""


def describe_command(name_or_recipe: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> None:
    """Write the description of a model to the standard output, as tables or as JSON."""
    description = describe(name_or_recipe, overrides)
    console = Console()
    if as_json:
        console.out(json.dumps(description, indent=2), highlight=False)
    else:
        console.print(table(description))


def describe(name_or_recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Describe the model of a recipe, or a named model with the paper's inputs.

    Args:
        name_or_recipe: name of a model, name of an installed recipe, or path of a recipe.
        overrides: `key.path=value`, as for every recipe; a named model has the sources `video` (32 frames of
            224 pixels) and `image`, so `data.sources.video.clip.frames=64` works there too.

    Errors:
        RecipeError: no such model or recipe, or a recipe that is wrong.
        ModelError: a tube that does not fit.
    """
    if name_or_recipe in model_names():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name_or_recipe}.yaml"
            path.write_text(PAPER_INPUTS.format(name=name_or_recipe), encoding="utf-8")
            return describe_recipe(load_recipe(str(path), overrides).recipe)
    known = [*model_names(), *recipe_names()]
    if not Path(name_or_recipe).exists() and name_or_recipe.removesuffix(".yaml") not in known:
        near = difflib.get_close_matches(name_or_recipe, known, n=1, cutoff=0.0)
        raise RecipeError(
            f"there is no model, recipe or file `{name_or_recipe}`; did you mean `{near[0]}`? "
            f"Models: {', '.join(model_names())}. Recipes: {', '.join(recipe_names()) or 'none installed'}."
        )
    return describe_recipe(load_recipe(name_or_recipe, overrides).recipe)


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Describe the model of a checked recipe; plain values only, ready for JSON.

    Nothing is allocated: the model is built on the meta device.
    """
    inputs = inputs_of(recipe)
    with torch.device("meta"):
        model = build_model(recipe.model, inputs)
    assert isinstance(model, TubeViT)
    parameters = count_parameters(model)
    return {
        "model": recipe.model.name,
        **asdict(model.size),
        "parameters": {**asdict(parameters), "tubes": list(parameters.tubes)},
        "tubes": [
            {**tube.model_dump(mode="json"), "sub_stride": list(sub_stride(tube)), "parameters": count}
            for tube, count in zip(model.tokenizer.shapes, parameters.tubes, strict=True)
        ],
        "sources": {name: _describe_source(model, spec) for name, spec in inputs.items()},
    }


def _describe_source(model: TubeViT, spec: InputSpec) -> dict[str, Any]:
    grids = model.tokenizer.grids((spec.frames, spec.size, spec.size))
    return {
        **asdict(spec),
        "tokens": sum(grid.tokens for grid in grids),
        "grids": [{"tube": grid.tube, "shape": list(grid.shape), "tokens": grid.tokens} for grid in grids],
        "cost": asdict(forward_cost(model, spec)),
    }


def table(description: dict[str, Any]) -> Group:
    """The description as tables for a terminal."""
    size = "{model}: width {width}, depth {depth}, {heads} heads, MLP {mlp_width}".format(**description)
    return Group(size, _parameter_table(description), _tube_table(description), _source_table(description))


def _plain_table(*headers: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        result.add_column(header, justify="right" if number else "left", no_wrap=True)
    return result


def _parameter_table(description: dict[str, Any]) -> Table:
    counts = description["parameters"]
    result = _plain_table("parameters", "number")
    lines = {
        "total": counts["total"],
        "encoder (ViT without classifier)": counts["encoder"],
        "tube kernels": counts["tokenizer"],
        "pooling": counts["pool"],
        **{f"classifier of {name}": count for name, count in counts["heads"].items()},
    }
    for name, count in lines.items():
        result.add_row(name, f"{count:,}")
    return result


def _tube_table(description: dict[str, Any]) -> Table:
    sources = description["sources"]
    columns = ("kernel", "stride", "offset", "space to\ndepth", "parameters")
    result = _plain_table("tube", *columns, *(f"tokens of\n{name}" for name in sources))
    for number, tube in enumerate(description["tubes"]):
        boxes = ["x".join(map(str, tube[key])) for key in ("kernel", "stride", "offset", "space_to_depth")]
        tokens = [
            next((str(grid["tokens"]) for grid in source["grids"] if grid["tube"] == number), "-")
            for source in sources.values()
        ]
        result.add_row(str(number + 1), *boxes, f"{tube['parameters']:,}", *tokens)
    return result


def _source_table(description: dict[str, Any]) -> Table:
    costs = ("GMAC\n", "GFLOP\n(2 per MAC)", "GFLOP\nas published")
    result = _plain_table("source", "clip", "classes", "tokens", *costs)
    for name, source in description["sources"].items():
        cost = [f"{source['cost'][key] / 1e9:.4g}" for key in ("multiply_adds", "flops", "published")]
        clip = "{frames}x{size}x{size}".format(**source)
        result.add_row(name, clip, str(source["classes"]), str(source["tokens"]), *cost)
    return result
