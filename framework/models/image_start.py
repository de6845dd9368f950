"""What tensors of an image ViT become in a video model (arXiv 2103.15691, §3.4).

With one frame repeated over the whole clip, both tubelets made of a patch kernel give the tokens of the image
at every time, and repeated places keep them equal. What follows depends on who attends to whom:

- model 2 and the baseline: every time has the vector of the image model, and so has the baseline's mean;
- models 1 and 3 without a class token, model 3 with its temporal output at zero: the tokens of the image;
- model 1 with a class token: those of the image model if the class token's logit as a key were smaller by the
  logarithm of the number of times, because it stands against so many copies of every patch;
- model 4: those of the image model if every patch attended to itself alone in the first half of the heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.errors import RecipeError
from framework.recipe.init_sections import ImageInit

__all__ = ["MAY_BE_NEW", "from_image", "resize_places"]

Shapes = dict[str, torch.Size]

MAY_BE_NEW = ("heads.", "temporal_", "times.", "pool_norm.", "decoder.")
"""What a video model may have and an image model has not, by the beginnings of names or of their parts."""


def from_image(
    name: str, tensor: Tensor, wanted: Shapes, how: ImageInit, *, factorised: bool
) -> dict[str, tuple[Tensor, str]]:
    """What a tensor of an image ViT becomes in a video model.

    Args:
        name: its name in the image model.
        tensor: the tensor.
        wanted: names and shapes of the video model's tensors.
        how: the choices of the recipe.
        factorised: the model is ViViT's model 3, whose temporal attention has its own choice.

    Returns:
        Tensors by their names in the video model, and how they were changed (empty: not at all). Nothing
        where the video model has no such tensor, or is to have its own.

    Errors:
        RecipeError: a kernel or places that cannot be brought to the wanted shape.
    """
    if name.startswith("tokenizer."):
        return _kernel(name, tensor, wanted, how)
    if name == "places.weight" and name in wanted:
        places, change = resize_places(tensor, wanted[name], how.positions)
        return {name: (places, change)}
    result = {}
    if wanted.get(name) == tensor.shape:
        result[name] = (tensor, "")
    temporal = name.replace(".attn.", ".temporal_attn.")
    if ".attn." in name and temporal in wanted:
        zero = factorised and (how.zero == "all" or (how.zero == "output" and ".attn.proj." in name))
        result[temporal] = (torch.zeros_like(tensor), "zero") if zero else (tensor, "copy")
    return result


def _kernel(name: str, tensor: Tensor, wanted: Shapes, how: ImageInit) -> dict[str, tuple[Tensor, str]]:
    """The kernel of a tubelet, (channels, 3, time, height, width), out of that of a patch, or its bias."""
    if how.tubelet == "random" or name not in wanted:
        return {}
    shape = wanted[name]
    if tensor.shape == shape:
        return {name: (tensor, "")}
    if tensor.ndim != 5 or tensor.shape[:2] != shape[:2] or tensor.shape[3:] != shape[3:]:
        raise RecipeError(
            f"init.image.run: {name} has the shape {list(tensor.shape)}, and {list(shape)} in this recipe's "
            "model. Take an image model with the same patches, or `init.image.tubelet: random`"
        )
    frames = shape[2]
    if how.tubelet == "inflated":
        return {name: (tensor.expand(shape) / frames, "inflated")}
    central = tensor.new_zeros(shape)
    central[:, :, frames // 2] = tensor[:, :, 0]
    return {name: (central, "central frame")}


def resize_places(tensor: Tensor, wanted: torch.Size, positions: str = "repeated") -> tuple[Tensor, str]:
    """Learned places (time, height, width, channels), or times (time, channels), for another grid.

    Returns them and how they were changed, in words.

    `repeated` interpolates between neighbours in space, and in time too, where a single time is repeated.
    `resized` zooms the square of an image to a square with as many places as the whole grid of a video.

    Errors:
        RecipeError: another width, or a grid that is no square.
    """
    if tensor.shape == wanted:
        return tensor, ""
    if tensor.ndim == len(wanted) == 2 and tensor.shape[1] == wanted[1]:
        times = _interpolate(tensor[:, None, None], (wanted[0], 1, 1))
        return times[:, 0, 0], "interpolated"
    if tensor.ndim != len(wanted) or tensor.shape[-1] != wanted[-1]:
        raise RecipeError(f"places of the shape {list(tensor.shape)} do not become {list(wanted)}")
    if positions == "resized" and wanted[0] > 1:
        side = math.isqrt(math.prod(wanted[:3]))
        if side**2 != math.prod(wanted[:3]) or len(tensor) != 1:
            raise RecipeError(
                f"init.image.positions: resized needs a square number of tokens, and {wanted[0]} x "
                f"{wanted[1]} x {wanted[2]} is none; take `repeated`"
            )
        zoomed = _interpolate(tensor, (1, side, side))
        return zoomed.reshape(wanted), "zoomed as a square"
    size = (len(tensor) if len(tensor) == 1 else wanted[0], *wanted[1:3])
    change = [] if tuple(tensor.shape[:3]) == size else ["interpolated"]
    result = _interpolate(tensor, size)
    if len(result) != wanted[0]:
        result, change = result.expand(wanted), [*change, "repeated over time"]
    return result.contiguous(), " and ".join(change)


def _interpolate(places: Tensor, size: tuple[int, ...]) -> Tensor:
    """Linear between the centres of (time, height, width, channels)."""
    channels_first = places.float().permute(3, 0, 1, 2).unsqueeze(0)
    resized = F.interpolate(channels_first, size=size, mode="trilinear", align_corners=False)
    return resized[0].permute(1, 2, 3, 0).to(places.dtype)
