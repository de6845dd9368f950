"""`tubeworks import`: another library's weights become a run that all commands know."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.data.sources import open_sources
from framework.errors import DataError, ModelError, RecipeError
from framework.files import replace_text
from framework.models.registry import build_model, inputs_of
from framework.models.scaleup import image_tube
from framework.models.weights.convert import Account, Target, fill, format_of
from framework.models.weights.files import read_weights
from framework.models.weights.formats import Format
from framework.recipe import dump_yaml, load_recipe, recipe_hash
from framework.recipe.model_sections import family_of
from framework.recipe.patches import check_clips_are_divided
from framework.recipe.schema import Model, Recipe
from framework.recipe.tube_sets import tubes_of
from framework.training.checkpoint_manifest import WEIGHT
from framework.training.data_facts import write_data_facts
from framework.training.distributed import Peers
from framework.training.saver import save_checkpoint
from framework.training.state import Fragment
from framework.world import World

__all__ = ["Import", "account_table", "import_weights"]

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"\b(blocks\.|layer\.|encoderblock_|encoder_layer_)\d+")


@dataclass(frozen=True)
class Import:
    """What was imported, from where, and what became of every tensor."""

    run: Path
    known: Format
    account: Account

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "run": str(self.run),
            "format": self.known.name,
            "title": self.known.title,
            "loaded": self.account.loaded,
            "new": self.account.new,
            "unused": self.account.unused,
        }


class _WeightsAlone:
    """A model's weights where a checkpoint expects the state of a training; without an optimizer."""

    kinds = (WEIGHT,)
    replicated = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def tensors(self, _kind: str) -> Iterator[tuple[Fragment, Tensor]]:
        """Every trainable parameter in one piece."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield Fragment(name, 0, parameter.numel(), 0), parameter.detach().float().flatten()

    def optimizer_steps(self) -> int:
        """None was taken."""
        return 0


def import_weights(
    file: Path,
    recipe_name: str,
    overrides: Sequence[str],
    run: Path,
    *,
    source: str | None = None,
    new: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> Import:
    """Make a run out of a file of weights: a recipe, and a checkpoint of step 0.

    The run can be evaluated, exported and predicted with, and others can begin with it (`init`).

    Args:
        file: a file or folder that `read_weights` reads.
        recipe_name: the recipe whose model they are for.
        overrides: `key.path=value`.
        run: a folder that is no run yet.
        source: whose classifier the file's is; only needed where the recipe has several sources.
        new: patterns of our tensors that may be missing in the file.
        unused: patterns of the file's tensors that may be left out.

    Errors:
        RecipeError: of the recipe, or a model of another family than the file's.
        ModelError: of the file; tensors that are missing or left over and that nobody named.
        CheckpointError: the run cannot be written.
    """
    if (run / "recipe.yaml").exists() or (run / "checkpoints").exists():
        raise RecipeError(f"{run} is a run already; choose another --run folder")
    recipe = load_recipe(recipe_name, overrides).recipe
    check_clips_are_divided(recipe)
    known, tensors = format_of(read_weights(file))
    _check_family(recipe, known, file)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, inputs_of(recipe))
    account = fill(model, tensors, known, _target(recipe, source), new=new, unused=unused)
    _write_run(run, recipe, model, {"file": str(file), "format": known.title})
    result = Import(run, known, account)
    replace_text(run / "import.json", json.dumps(result.as_dict(), indent=1) + "\n")
    return result


def _write_run(run: Path, recipe: Recipe, model: nn.Module, imported: dict[str, str]) -> None:
    """A run whose only checkpoint, that of step 0, holds the model's weights."""
    run.mkdir(parents=True, exist_ok=True)
    facts = {
        "recipe": recipe_hash(recipe),
        "plan": "",
        "zero": 0,
        "precision": "fp32",
        "skipped_steps": 0,
        "imported": imported,
    }
    state: Any = _WeightsAlone(model)
    save_checkpoint(run, 0, model, state, Peers(World(), None), facts)
    # Last: a recipe without these weights would be a run that trains from nothing.
    replace_text(run / "recipe.yaml", dump_yaml(recipe))
    _keep_class_names(run, recipe)


def _keep_class_names(run: Path, recipe: Recipe) -> None:
    """Take the names of the classes from the recipe's shards, where they are there."""
    try:
        write_data_facts(run, open_sources(recipe))
    except DataError as error:
        log.warning("predictions will be numbers, as the names of the classes are with the shards: %s", error)


def _check_family(recipe: Recipe, known: Format, file: Path) -> None:
    family = family_of(recipe.model)
    taken_by = {"vit": ("vit", "tubevit")}.get(known.family, (known.family,))
    if family not in taken_by:
        more = " (a run of a `vit` starts video models: `init.image`)" if known.family == "vit" else ""
        raise RecipeError(
            f"{file} is a {known.title}, which becomes a model of the family {' or '.join(taken_by)}; the "
            f"recipe's is {recipe.model.name}{more}"
        )


def _target(recipe: Recipe, source: str | None) -> Target:
    sources = recipe.data.sources
    if source is None and len(sources) > 1:
        raise ModelError(f"whose classifier is the file's? Say --source {' or --source '.join(sources)}")
    name = source or next(iter(sources))
    if name not in sources:
        raise ModelError(f"--source {name}: the recipe's sources are {', '.join(sources)}")
    if not isinstance(recipe.model, Model):
        return Target(name)
    number = image_tube(tubes_of(recipe.model))
    if number is None:
        raise RecipeError("none of the recipe's tubes reads images (has a temporal kernel of 1)")
    return Target(name, number)


def account_table(account: Account) -> str:
    """What happened to each tensor; one line for all blocks."""
    counts = Counter((what, _BLOCK.sub(r"\1*", name)) for what, name in account.lines())
    width = max(len(what) for what, _ in counts)
    return "\n".join(
        f"  {what:<{width}}  {name}" + (f" x {count}" if count > 1 else "")
        for (what, name), count in counts.items()
    )
