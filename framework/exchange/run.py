"""What a run or an export has for those who only use it: recipe, weights, model, and names of classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from framework.errors import CheckpointError, ModelError, RecipeError, TubeworksError
from framework.models.registry import build_model, inputs_of
from framework.models.weights.files import read_weights
from framework.recipe import load_recipe
from framework.recipe.model_sections import reconstructs
from framework.recipe.schema import Recipe, Source
from framework.training.checkpoint import load_weights, newest_valid, read_manifest
from framework.training.checkpoint_manifest import AVERAGE
from framework.training.data_facts import read_data_facts

__all__ = [
    "EXPORTED",
    "ExportedModel",
    "FinishedRun",
    "TrainedModel",
    "Weights",
    "check_classifies",
    "open_finished",
    "open_trained",
    "recipe_of",
]

EXPORTED = "model.safetensors"
"""The weights in a folder of `tubeworks export --to safetensors`."""

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class TrainedModel(ABC):
    """A recipe and weights of its model, with the names of the classes."""

    folder: Path
    recipe: Recipe

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The weights in full, float32, by their names in the model."""

    def model(self, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with these weights, ready to evaluate.

        Errors:
            ModelError: the weights are not those of the recipe's model.
        """
        with torch.device("meta"):
            model = build_model(self.recipe.model, inputs_of(self.recipe))
        state = self.state()
        if others := sorted(name for name, _ in _shapes(state) ^ _shapes(model.state_dict())):
            raise ModelError(
                f"{self.folder}: the weights are not those of recipe.yaml's model (first at {others[0]}); an "
                "export for another library becomes a run with `tubeworks import`"
            )
        model.load_state_dict(state, assign=True)
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def source(self, name: str | None) -> tuple[str, Source]:
        """The source of a name, or the only one.

        Errors:
            ModelError: no such source, or several and none was named.
        """
        sources = self.recipe.data.sources
        if name is None and len(sources) == 1:
            name = next(iter(sources))
        if name not in sources:
            wrong = f"there is no source {name}" if name else "it has several sources"
            raise ModelError(f"{self.folder}: {wrong}; name one of them with --source: {', '.join(sources)}")
        return name, sources[name]

    def classes(self, name: str) -> list[str]:
        """The names of a source's classes in the order of its logits; numbers where no names were kept."""
        count = self.recipe.data.sources[name].targets.outputs
        names = read_data_facts(self.folder).get(name, {}).get("classes", [])
        return [str(entry) for entry in names] if len(names) == count else [str(n) for n in range(count)]


@dataclass(frozen=True)
class FinishedRun(TrainedModel):
    """A run with a checkpoint; `averaged` says which of its weights are taken."""

    checkpoint: Path
    averaged: bool

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return int(read_manifest(self.checkpoint)["step"])

    def state(self) -> dict[str, Tensor]:
        """The weights of the checkpoint, or their moving averages."""
        return load_weights(self.checkpoint, ema=self.averaged)


@dataclass(frozen=True)
class ExportedModel(TrainedModel):
    """A folder that `tubeworks export --to safetensors` wrote."""

    def state(self) -> dict[str, Tensor]:
        """The weights of the export's file."""
        return read_weights(self.folder / EXPORTED)


def _shapes(state: dict[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in state.items()}


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run.

    Errors:
        TubeworksError: no run has begun in the folder.
        RecipeError: of the recipe.
    """
    if not (run / "recipe.yaml").is_file():
        raise TubeworksError(f"{run} has no recipe.yaml: it is not the folder of a run that has begun")
    return load_recipe(str(run / "recipe.yaml")).recipe


def check_classifies(run: Path, recipe: Recipe) -> None:
    """Refuse a run whose model gives losses and not logits.

    Errors:
        RecipeError: says what to do with it.
    """
    if reconstructs(recipe.model):
        raise RecipeError(
            f"{run} trains a masked autoencoder, which has no classifier: fine-tune it first, with "
            f"`init: {{weights: {run}}}` and without `model.pretrain`"
        )


def open_finished(folder: Path, weights: Weights | None = None) -> FinishedRun:
    """The newest valid checkpoint of a run; averaged weights by default where there are any.

    Errors:
        TubeworksError: no run, no valid checkpoint, or no averages where they are asked for.
    """
    recipe = recipe_of(folder)
    checkpoint = newest_valid(folder)
    has_average = AVERAGE in read_manifest(checkpoint)["kinds"]
    if weights == "ema" and not has_average:
        raise CheckpointError(
            f"{checkpoint} holds no averaged weights: the run had no train.ema_decay. Use --weights raw"
        )
    return FinishedRun(folder, recipe, checkpoint, has_average if weights is None else weights == "ema")


def open_trained(folder: Path, weights: Weights | None = None) -> TrainedModel:
    """The newest valid checkpoint of a run, as `open_finished`, or the weights of an export.

    Errors:
        TubeworksError: as `open_finished`; or a kind of weights is asked of an export, which has only one.
    """
    if (folder / "checkpoints").exists() or not (folder / EXPORTED).is_file():
        return open_finished(folder, weights)
    if weights is not None:
        raise ModelError(f"--weights {weights}: {folder} is an export, which holds one kind: leave it out")
    return ExportedModel(folder, recipe_of(folder))
