"""The weights that a new run starts from: those of another run, with an account of every tensor."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import CheckpointError, RecipeError
from framework.models.registry import size_of
from framework.recipe import load_recipe
from framework.recipe.schema import Init, Model, Recipe
from framework.training.checkpoint import CheckpointReader, newest_valid, verify
from framework.training.checkpoint_manifest import MANIFEST
from framework.training.distributed import Peers
from framework.training.state import AVERAGE, WEIGHT

__all__ = ["Account", "Origin", "find_origins", "initialise", "load_initial"]

log = logging.getLogger(__name__)

HEADS = "heads."
_BLOCK = re.compile(r"\bblocks\.\d+\.")
NO_MATTER = {"dropout", "stochastic_depth"}
"""What may differ between a model and the one that its weights come from without a word."""


@dataclass(frozen=True)
class Origin:
    """A checkpoint that weights come from, for the key `init.ROLE`, and the model that it is of."""

    role: str
    checkpoint: Path
    model: Model

    @property
    def name(self) -> str:
        """The words by which messages call it."""
        return f"init.{self.role} ({self.checkpoint})"


@dataclass
class Account:
    """What became of every tensor: where the model's come from, and what was not taken."""

    loaded: dict[str, str] = field(default_factory=dict)
    """Name in the model: `role:name in the checkpoint`."""
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """`role:name in the checkpoint`."""

    def table(self) -> str:
        """What happened, name, from where, and how many; a line stands for all blocks of the encoder."""
        lines = [("loaded", name, f"from {source.partition(':')[0]}") for name, source in self.loaded.items()]
        lines += [("new", name, "") for name in self.new]
        lines += [("unused", name, "") for name in self.unused]
        counts = Counter((what, _BLOCK.sub("blocks.*.", name), source) for what, name, source in lines)
        return "\n".join(
            f"  {what:<7} {name} {source}".rstrip() + (f" x {count}" if count > 1 else "")
            for (what, name, source), count in counts.items()
        )


def initialise(model: nn.Module, recipe: Recipe, peers: Peers) -> dict[str, Any]:
    """Fill a model with the weights that `recipe.init` names, all ranks together.

    Returns what to write down about it: the checkpoints and the account.

    Errors:
        RecipeError: a folder that is no run, or a run of another model.
        CheckpointError: no valid checkpoint there.
    """
    init = recipe.init
    assert init is not None
    origins = peers.on_main(lambda: find_origins(init))
    account = peers.together(lambda: load_initial(model, recipe, origins))
    if peers.world.is_main:
        counts = len(account.loaded), len(account.new), len(account.unused)
        log.info("initial weights: %d tensors loaded, %d new, %d unused\n%s", *counts, account.table())
    return {
        "from": {origin.role: str(origin.checkpoint) for origin in origins},
        "ema": init.ema,
        "loaded": account.loaded,
        "new": account.new,
        "unused": account.unused,
    }


def find_origins(init: Init) -> list[Origin]:
    """The checkpoints behind the folders of `init`, verified.

    Errors:
        RecipeError: a folder that is no run.
        CheckpointError: no valid checkpoint there.
    """
    named = {"weights": init.weights}
    return [_find(role, Path(folder)) for role, folder in named.items() if folder is not None]


def _find(role: str, folder: Path) -> Origin:
    if (folder / MANIFEST).is_file():
        run, checkpoint = folder.absolute().parent.parent, folder
    else:
        run, checkpoint = folder, None
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(
            f"init.{role}: {folder} is neither a run (there is no {run / 'recipe.yaml'}) nor a checkpoint of "
            "one; name the --run folder of a finished training"
        )
    if checkpoint is None:
        checkpoint = newest_valid(run)
    elif problems := verify(checkpoint):
        raise CheckpointError(f"init.{role}: {checkpoint} does not verify: {'; '.join(problems)}")
    return Origin(role, checkpoint, load_recipe(str(run / "recipe.yaml")).recipe.model)


def load_initial(model: nn.Module, recipe: Recipe, origins: Sequence[Origin]) -> Account:
    """Fill a model that is not partitioned yet, one tensor at a time.

    Errors:
        RecipeError: a tensor that only one side has and that is no classifier, or another shape.
        CheckpointError: moving averages are asked for, and there are none.
    """
    assert recipe.init is not None
    account = Account()
    for origin in origins:
        _check_same_model(recipe.model, origin)
        _take(model, origin, _tensors(origin, recipe.init.ema), lambda name: name, account)
    missing = [name for name in model.state_dict() if name not in account.loaded]
    account.new = [name for name in missing if name.startswith(HEADS)]
    if lacking := [name for name in missing if name not in account.new]:
        raise RecipeError(
            f"{' and '.join(origin.name for origin in origins)}: {_some(lacking)} in this recipe's "
            "model, but not there; only classifiers may be new. Make `model` say what that run says"
        )
    return account


def _tensors(origin: Origin, average: bool) -> Iterator[tuple[str, Tensor]]:
    reader = CheckpointReader(origin.checkpoint)
    if average and AVERAGE not in reader.kinds:
        raise CheckpointError(
            f"{origin.name} holds no moving average: that run had no train.ema_decay. Say `init.ema: false`"
        )
    return reader.tensors(AVERAGE if average else WEIGHT)


@torch.no_grad()
def _take(
    model: nn.Module,
    origin: Origin,
    tensors: Iterator[tuple[str, Tensor]],
    rename: Callable[[str], str | None],
    account: Account,
) -> None:
    """Copy tensors to their names in the model; `rename` gives None for what is not wanted."""
    targets = model.state_dict()
    unknown = []
    for name, tensor in tensors:
        wanted, source = rename(name), f"{origin.role}:{name}"
        target = targets.get(wanted) if wanted else None
        is_head = name.startswith(HEADS)
        if wanted is None or (is_head and (target is None or target.shape != tensor.shape)):
            account.unused.append(source)
        elif target is None:
            unknown.append(name)
        elif target.shape != tensor.shape:
            raise RecipeError(
                f"{origin.name}: {name} has the shape {list(tensor.shape)}, and {list(target.shape)} in this "
                "recipe's model. Make `model` and the sources' clips say what that run says"
            )
        else:
            target.copy_(tensor)
            account.loaded[wanted] = source
    if unknown:
        raise RecipeError(
            f"{origin.name}: {_some(unknown)} there, but not in this recipe's model; only classifiers may be "
            "left out. Make `model` say what that run says"
        )


def _check_same_model(model: Model, origin: Origin) -> None:
    """Refuse another size; say what else differs, which need not show in the shapes of the weights."""
    ours, theirs = size_of(model), size_of(origin.model)
    if ours != theirs:
        raise RecipeError(f"{origin.name} is of another model: {theirs}, and this recipe's is {ours}")
    before, after = origin.model.model_dump(), model.model_dump()
    others = [
        key
        for key in after
        if before[key] != after[key]
        and key not in NO_MATTER | {"name", "width", "depth", "heads", "mlp_width"}
    ]
    if others:
        log.warning(
            "%s was trained with other values of model.%s; its weights are taken all the same",
            origin.name,
            ", model.".join(others),
        )


def _some(names: Sequence[str]) -> str:
    """The first few names, and `is` or `are`."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
