"""The first weights of a video model out of a run of an image ViT, with an account of every tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from framework.errors import RecipeError
from framework.models.image_start import MAY_BE_NEW, from_image
from framework.recipe.init_sections import ImageInit
from framework.recipe.schema import MTV, AnyModel, Model, ViT
from framework.training.account import Account
from framework.training.origin import Origin, check_same_size

__all__ = ["take_image"]

log = logging.getLogger(__name__)


@torch.no_grad()
def take_image(
    model: nn.Module,
    section: AnyModel,
    how: ImageInit,
    origin: Origin,
    tensors: Iterator[tuple[str, Tensor]],
    account: Account,
) -> tuple[str, ...]:
    """Fill a video model with what an image model's tensors become in it.

    Returns the beginnings of names, or of parts of names, that may stay new.

    Errors:
        RecipeError: models that do not go together, or tensors that cannot be brought to their new shape.
    """
    if not isinstance(origin.model, ViT) or isinstance(section, Model | ViT | MTV):
        raise RecipeError(
            f"{origin.name} is a run of {origin.model.name}, and this recipe's model is {section.name}: "
            "`init.image` makes a vivit, timesformer or videomae out of a vit"
        )
    check_same_size(section, origin)
    if section.gelu != origin.model.gelu:
        log.warning(
            "%s was trained with model.gelu: %s; this model says %s",
            origin.name,
            origin.model.gelu,
            section.gelu,
        )
    factorised = section.name.endswith("_m3")
    if factorised and how.zero == "all":
        log.warning(
            "init.image.zero: all sets all weights of the temporal attention to zero, as the paper has it. "
            "No gradient reaches any of its kernels then, so it never learns; `output` does"
        )
    targets = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in targets.items()}
    for name, tensor in tensors:
        source = f"image:{name}"
        made = from_image(name, tensor, shapes, how, factorised=factorised)
        for wanted, (value, change) in made.items():
            targets[wanted].copy_(value)
            if change:
                account.resized[wanted] = f"{source} ({change})"
            else:
                account.loaded[wanted] = source
        if not made:
            account.unused.append(source)
    own_kernel = ("tokenizer.",) if how.tubelet == "random" else ()
    own_class_token = ("class_token", "class_place") if origin.model.pool == "mean" else ()
    return (*MAY_BE_NEW, *own_kernel, *own_class_token)
