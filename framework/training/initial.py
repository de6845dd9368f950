"""The weights that a new run starts from: those of other runs, with an account of every tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.errors import CheckpointError, RecipeError
from framework.models.image_start import resize_places
from framework.models.registry import size_of
from framework.models.scaleup import image_tube
from framework.recipe import load_recipe
from framework.recipe.schema import AnyModel, Init, Model, Recipe, VideoMAE
from framework.recipe.tube_sets import name_tube, tubes_of
from framework.training.account import Account
from framework.training.checkpoint import CheckpointReader, newest_valid, verify
from framework.training.checkpoint_manifest import AVERAGE, MANIFEST, WEIGHT
from framework.training.distributed import Peers
from framework.training.image_initial import take_image
from framework.training.origin import Origin, check_same_size, some

__all__ = ["Account", "Origin", "find_origins", "initialise", "load_initial"]

log = logging.getLogger(__name__)

HEADS, GATE, TUBES = "heads.", "gate.", "tokenizer.tubes."
PLACES = ("places.weight", "times.weight")
"""Ends of the names of tables that can be interpolated to another grid."""
NO_MATTER = {"dropout", "stochastic_depth"}
"""What may differ between a model and the one that its weights come from without a word."""


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
        counts = len(account.loaded), len(account.resized), len(account.new), len(account.unused)
        words = "initial weights: %d tensors loaded, %d resized, %d new, %d unused\n%s"
        log.info(words, *counts, account.table())
    return {
        "from": {origin.role: str(origin.checkpoint) for origin in origins},
        "ema": init.ema,
        "loaded": account.loaded,
        "resized": account.resized,
        "new": account.new,
        "unused": account.unused,
    }


def find_origins(init: Init) -> list[Origin]:
    """The checkpoints behind the folders of `init`, verified.

    Errors:
        RecipeError: a folder that is no run.
        CheckpointError: no valid checkpoint there.
    """
    image = init.image.run if init.image else None
    named = {"weights": init.weights, "tubes": init.tubes, "encoder": init.encoder, "image": image}
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
    may_be_new = (HEADS,) if "weights" in (origin.role for origin in origins) else (HEADS, GATE)
    for origin in origins:
        tensors = _tensors(origin, recipe.init.ema)
        if origin.role == "image":
            assert recipe.init.image is not None
            may_be_new = take_image(model, recipe.model, recipe.init.image, origin, tensors, account)
            continue
        if _became_classifier(recipe.model, origin):
            may_be_new = (*may_be_new, "pool_norm.")
        _take(model, origin, tensors, _rules(recipe.model, origin), account)
    missing = [name for name in model.state_dict() if name not in {**account.loaded, **account.resized}]
    account.new = [name for name in missing if any(f".{part}" in f".{name}" for part in may_be_new)]
    if lacking := [name for name in missing if name not in account.new]:
        raise RecipeError(
            f"{' and '.join(origin.name for origin in origins)}: {some(lacking)} in this recipe's "
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
        elif target.shape != tensor.shape and name.endswith(PLACES) and target.ndim == tensor.ndim:
            grid, change = resize_places(tensor, target.shape)
            target.copy_(grid)
            account.resized[wanted] = f"{source} ({change})"
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
            f"{origin.name}: {some(unknown)} there, but not in this recipe's model; only classifiers may be "
            "left out. Make `model` say what that run says"
        )


def _rules(model: AnyModel, origin: Origin) -> Callable[[str], str | None]:
    """The names that an origin's tensors have in the model, None for what is not wanted.

    Errors:
        RecipeError: the run is of another kind than its role needs.
    """
    if origin.role == "weights":
        if _became_classifier(model, origin):
            _check_same_model(model, origin, "pretrain")
            return lambda name: None if name.startswith(("decoder.", "norm.")) else name
        _check_same_model(model, origin)
        return lambda name: name
    if not isinstance(model, Model) or not isinstance(origin.model, Model):
        raise RecipeError(f"{origin.name}: a scale-up is made of TubeViTs, and {origin.model.name} is none")
    if origin.role == "tubes":
        numbers = _matching_tubes(model, origin.model, origin)
        return lambda name: _renumber(name, numbers) if name.startswith(TUBES) else None
    if origin.model.scale_up is not None:
        raise RecipeError(f"{origin.name} is a scale-up itself, which has a gate; name a run on images")
    _check_same_model(model, origin, "scale_up", "tubes", "tube_set", "kernels", "interpolate_2d")
    numbers = _image_tubes(model, origin.model, origin)
    return lambda name: name if not name.startswith("tokenizer.") else _renumber(name, numbers)


def _became_classifier(model: AnyModel, origin: Origin) -> bool:
    """Whether the weights of a masked autoencoder are to become a classifier."""
    return (
        isinstance(model, VideoMAE)
        and isinstance(origin.model, VideoMAE)
        and model.pretrain is None
        and origin.model.pretrain is not None
    )


def _renumber(name: str, numbers: Mapping[int, int]) -> str | None:
    if not name.startswith(TUBES):
        return None
    number, _, rest = name.removeprefix(TUBES).partition(".")
    return f"{TUBES}{numbers[int(number)]}.{rest}" if int(number) in numbers else None


def _matching_tubes(model: Model, small: Model, origin: Origin) -> dict[int, int]:
    """Numbers of the small model's tubes for videos, and of the same tubes in the large model."""
    assert model.scale_up is not None
    width = size_of(small).width
    if small.kernels != "independent" or small.scale_up is not None:
        kind = "interpolated kernels" if small.scale_up is None else "bridged tubes (it is a scale-up)"
        raise RecipeError(f"{origin.name} has {kind}; take a TubeViT with a kernel for each tube")
    if width != model.scale_up.tube_width:
        raise RecipeError(
            f"{origin.name} has tubes of width {width}, and model.scale_up.tube_width is "
            f"{model.scale_up.tube_width}"
        )
    theirs, ours = tubes_of(small), tubes_of(model)
    skipped = image_tube(theirs)
    places = {tube: number for number, tube in enumerate(theirs) if number != skipped}
    wanted = [number for number in range(len(ours)) if number != image_tube(ours)]
    for number in wanted:
        if ours[number] not in places:
            there = "; ".join(name_tube(theirs, place) for place in places.values())
            raise RecipeError(
                f"{origin.name} has no such tube for videos as {name_tube(ours, number)}; there are: "
                f"{there or 'none, it is a model of images'}"
            )
    return {places[ours[number]]: number for number in wanted}


def _image_tubes(model: Model, large: Model, origin: Origin) -> dict[int, int]:
    """The number of the 2D patches in the image model, and in the large one; nothing for videos alone."""
    theirs, ours = image_tube(tubes_of(large)), image_tube(tubes_of(model))
    if ours is None:
        return {}
    if theirs is None:
        raise RecipeError(f"{origin.name} reads no images: none of its tubes has a temporal kernel of 1")
    if large.interpolate_2d:
        raise RecipeError(f"{origin.name} has no patches of its own, but an interpolated kernel")
    return {theirs: ours}


def _check_same_model(model: AnyModel, origin: Origin, *no_matter: str) -> None:
    """Refuse another size; say what else differs, which need not show in the shapes of the weights."""
    check_same_size(model, origin)
    before, after = origin.model.model_dump(), model.model_dump()
    others = [
        key
        for key in after
        if before.get(key) != after[key]
        and key not in NO_MATTER.union(no_matter)
        and key not in {"name", "width", "depth", "heads", "mlp_width"}
    ]
    if others:
        log.warning(
            "%s was trained with other values of model.%s; its weights are taken all the same",
            origin.name,
            ", model.".join(others),
        )
