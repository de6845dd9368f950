"""What a model is, before it is trained: tubes, tokens, parameters and operations (`tubeworks describe`).

The description is made for programs, and for comparing with what papers print. Its keys:

- `name`, and the numbers of the encoder; `position`, `pool` and `kernels` as in the recipe;
- `tokens`: of one sample of each source, a class token included;
- `parameters`, `encoder_parameters` (see `cost.Parameters`) and `parameter_groups`, the parts;
- `cost`: of one forward pass of one view, in 1e9, counted in three ways (see `work`): `mac`, `hlo_half` and
  `flop`. For a model that is described by its name alone, those of a clip; for a recipe, per source;
- `tubes`, and `sources` with the grids, cost and coverage of each.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import nn

from framework.errors import RecipeError
from framework.models.cost import count_parameters, forward_cost, sequence_length
from framework.models.coverage import coverage, search
from framework.models.describe_video import cost_of, describe_video_model, video_tables
from framework.models.inputs import InputSpec, inputs_of
from framework.models.mtv import MTV
from framework.models.registry import build_model, model_families, model_names
from framework.models.tables import clip_in_words, plain_table
from framework.models.tubes import sub_stride
from framework.models.tubevit import TubeViT
from framework.models.video_model import VideoModel
from framework.recipe import Recipe, load_recipe, recipe_names
from framework.recipe.patches import check_clips_are_divided
from framework.recipe.schema import Model, Tube

__all__ = [
    "describe",
    "describe_command",
    "describe_recipe",
    "search_command",
    "search_tubes",
    "table",
]

# A model that is described by its name alone reads what its paper reports: TubeViT Kinetics-600 and ImageNet
# (§3.2, §3.5), the other video models Kinetics-400, ViT ImageNet.
VIDEO = "video: {{path: shards, kind: video, classes: {}, size: 224, clip: {{frames: {}, {}}}}}"
IMAGE = "image: {path: shards, kind: image, classes: 1000, size: 224}"
PAPER_SOURCES = {
    "tubevit": (VIDEO.format(600, 32, "fps: 15"), IMAGE),
    "vit": (IMAGE,),
    "vivit": (VIDEO.format(400, 32, "stride: 2"),),
    "timesformer": (VIDEO.format(400, 8, "stride: 32"),),
    "videomae": (VIDEO.format(400, 16, "stride: 4"),),
    "mtv": (VIDEO.format(400, 32, "stride: 2"),),
}
PAPER_RECIPE = """\
name: describe
model: {{name: {name}}}
data:
  sources: {{{sources}}}
  mixture: {{{mixture}}}
optimizer: {{lr: 1e-4}}
train: {{steps: 1}}
"""


def describe_command(name_or_recipe: str, overrides: Sequence[str] = (), *, as_json: bool = False) -> None:
    """Write the description of a model to the standard output, as tables or as JSON."""
    description = describe(name_or_recipe, overrides)
    _write(description if as_json else table(description))


def search_command(
    name_or_recipe: str, overrides: Sequence[str] = (), *, gmac: float | None = None, as_json: bool = False
) -> None:
    """Write the tube sets that `search_tubes` finds to the standard output, as a table or as JSON."""
    result = search_tubes(name_or_recipe, overrides, gmac=gmac)
    _write(result if as_json else _search_table(result))


def _write(what: Any) -> None:
    console = Console()
    if isinstance(what, dict):
        console.out(json.dumps(what, indent=2), highlight=False)
    else:
        console.print(what)


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
    description = describe_recipe(_load(name_or_recipe, overrides))
    if name_or_recipe in model_names():
        description["cost"] = next(iter(description["cost"].values()))
    return description


def _load(name_or_recipe: str, overrides: Sequence[str]) -> Recipe:
    if name_or_recipe in model_names():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name_or_recipe}.yaml"
            path.write_text(_paper_recipe(name_or_recipe), encoding="utf-8")
            return load_recipe(str(path), overrides).recipe
    known = [*model_names(), *recipe_names()]
    if not Path(name_or_recipe).exists() and name_or_recipe.removesuffix(".yaml") not in known:
        near = difflib.get_close_matches(name_or_recipe, known, n=3, cutoff=0.6)
        near = near or difflib.get_close_matches(name_or_recipe, known, n=1, cutoff=0.0)
        raise RecipeError(
            f"there is no model, recipe or file `{name_or_recipe}`; did you mean "
            f"{' or '.join(f'`{name}`' for name in near)}?\nModels:\n  "
            + "\n  ".join(model_families())
            + "\nRecipes: `tubeworks recipe list` names them"
        )
    return load_recipe(name_or_recipe, overrides).recipe


def _paper_recipe(name: str) -> str:
    """A recipe in which a model reads the sources of its paper."""
    sources = PAPER_SOURCES[name.partition("_")[0]]
    mixture = ", ".join(f"{source.partition(':')[0]}: 1" for source in sources)
    return PAPER_RECIPE.format(name=name, sources=", ".join(sources), mixture=mixture)


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Describe the model of a checked recipe; plain values only, ready for JSON.

    Nothing is allocated: the model is built on the meta device.

    Errors:
        RecipeError: no such model, or clips that its patches do not divide.
        ModelError: a tube that does not fit.
    """
    check_clips_are_divided(recipe)
    inputs = inputs_of(recipe)
    model = _on_meta(recipe)
    if isinstance(model, VideoModel | MTV):
        return _with_repeats(recipe, describe_video_model(recipe, model, inputs))
    assert isinstance(model, TubeViT)
    parameters = asdict(count_parameters(model))
    total, tubes = parameters.pop("total"), parameters.pop("tubes")
    sources = {name: _describe_source(model, spec) for name, spec in inputs.items()}
    description = {
        "name": recipe.model.name,
        **asdict(model.size),
        **{key: getattr(recipe.model, key) for key in ("position", "pool", "kernels")},
        "tokens": {name: source["tokens"] for name, source in sources.items()},
        "parameters": total,
        "encoder_parameters": parameters["encoder"],
        "parameter_groups": parameters,
        "cost": {name: source["cost"] for name, source in sources.items()},
        "tubes": [
            {**_plain(tube), "sub_stride": list(sub_stride(tube)), "parameters": count}
            for tube, count in zip(model.tokenizer.shapes, tubes, strict=True)
        ],
        "sources": sources,
    }
    return _with_repeats(recipe, description)


def _with_repeats(recipe: Recipe, description: dict[str, Any]) -> dict[str, Any]:
    """The description, with how many views each source gives of a sample, where they are several."""
    for name, source in description["sources"].items():
        if (repeats := recipe.data.sources[name].repeats) > 1:
            source["repeats"] = repeats
    return description


def _on_meta(recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        return build_model(recipe.model, inputs_of(recipe))


def _plain(tube: Tube) -> dict[str, Any]:
    return tube.model_dump(mode="json")


def search_tubes(
    name_or_recipe: str, overrides: Sequence[str] = (), *, gmac: float | None = None
) -> dict[str, Any]:
    """Find tube sets for the first video source of a model or recipe (see `coverage.search`).

    Args:
        name_or_recipe: as for `describe`.
        overrides: as for `describe`.
        gmac: the budget in 1e9 multiply-adds for one forward pass of one clip; None: what its own tubes cost.

    Errors:
        RecipeError: no such model or recipe, one without a video source, or a budget that is too small.
    """
    recipe = _load(name_or_recipe, overrides)
    if not isinstance(recipe.model, Model):
        raise RecipeError(f"`{name_or_recipe}` has no tubes to search for: it is no TubeViT")
    videos = [(name, spec) for name, spec in inputs_of(recipe).items() if spec.frames > 1]
    if not videos:
        raise RecipeError(f"`{name_or_recipe}` reads no video, so there are no tubes to search for")
    (source, spec), model = videos[0], _on_meta(recipe)
    assert isinstance(model, TubeViT)
    clip = (spec.frames, spec.size, spec.size)
    own = forward_cost(model, spec).multiply_adds
    found = search(model, spec, own if gmac is None else gmac * 1e9)
    return {
        "name": recipe.model.name,
        "source": source,
        "clip": list(clip),
        "gmac": own / 1e9 if gmac is None else gmac,
        "own": {
            "tubes": [_plain(tube) for tube in model.tokenizer.shapes],
            "tokens": sequence_length(model, spec),
            "gmac": own / 1e9,
            "coverage": coverage(model.tokenizer.shapes, clip),
        },
        "found": [
            {
                "tubes": [_plain(tube) for tube in one.tubes],
                "tokens": one.tokens,
                "gmac": one.multiply_adds / 1e9,
                "coverage": one.coverage,
            }
            for one in found
        ],
    }


def _describe_source(model: TubeViT, spec: InputSpec) -> dict[str, Any]:
    clip = (spec.frames, spec.size, spec.size)
    grids = model.tokenizer.grids(clip)
    return {
        **{key: value for key, value in asdict(spec).items() if key != "heads" or value},
        "tokens": sequence_length(model, spec),
        "coverage": coverage(model.tokenizer.shapes, clip),
        "grids": [{"tube": grid.tube, "shape": list(grid.shape), "tokens": grid.tokens} for grid in grids],
        "cost": cost_of(forward_cost(model, spec)),
    }


def table(description: dict[str, Any]) -> Group:
    """The description as tables for a terminal."""
    if "tubes" not in description:
        return video_tables(description)
    size = "{name}: width {width}, depth {depth}, {heads} heads, MLP {mlp_width}".format(**description)
    return Group(size, _parameter_table(description), _tube_table(description), _source_table(description))


def _parameter_table(description: dict[str, Any]) -> Table:
    counts = description["parameter_groups"]
    result = plain_table("parameters", "number")
    rest = counts["positions"] + counts["pool"] + counts["class_token"] + sum(counts["heads"].values())
    # The patches that images have are among the encoder's.
    kernels = description["parameters"] - counts["encoder"] - rest
    lines = {
        "total": description["parameters"],
        "encoder (ViT without classifier)": counts["encoder"],
        "tube kernels" if kernels == counts["tokenizer"] else "other tube kernels": kernels,
        **({"learned positions": counts["positions"]} if counts["positions"] else {}),
        "pooling": counts["pool"] + counts["class_token"],
        **{f"classifier of {name}": count for name, count in counts["heads"].items()},
    }
    for name, count in lines.items():
        result.add_row(name, f"{count:,}")
    return result


def _tube_table(description: dict[str, Any]) -> Table:
    sources = description["sources"]
    columns = ("kernel", "stride", "offset", "space to\ndepth", "parameters")
    result = plain_table("tube", *columns, *(f"tokens of\n{name}" for name in sources))
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
    result = plain_table("source", "clip", "classes", "tokens", "read", *costs)
    for name, source in description["sources"].items():
        cost = [f"{source['cost'][key]:.4g}" for key in ("mac", "flop", "hlo_half")]
        clip = clip_in_words(source)
        numbers = (str(source["classes"]), str(source["tokens"]), f"{source['coverage']:.1%}")
        result.add_row(name, clip, *numbers, *cost)
    return result


def _search_table(result: dict[str, Any]) -> Group:
    clip = "x".join(map(str, result["clip"]))
    head = f"{result['name']}, clips of {clip}, at most {result['gmac']:.4g} GMAC a clip; * are its own tubes"
    lines = plain_table("tubes: kernel/stride+offset, ×Space-to-Depth", "read", "tokens", "GMAC")
    for mark, entry in [(" *", result["own"]), *(("", entry) for entry in result["found"])]:
        tubes = "\n".join(_short(tube) for tube in entry["tubes"]) + mark
        lines.add_row(tubes, f"{entry['coverage']:.1%}", str(entry["tokens"]), f"{entry['gmac']:.4g}")
        lines.add_section()
    return Group(head, lines)


def _short(tube: dict[str, Any]) -> str:
    kernel, stride, offset, factors = (
        "x".join(map(str, tube[key])) for key in ("kernel", "stride", "offset", "space_to_depth")
    )
    shifted = f"+{offset}" if any(tube["offset"]) else ""
    return f"{kernel}/{stride}{shifted}" + (f", ×{factors}" if max(tube["space_to_depth"]) > 1 else "")
