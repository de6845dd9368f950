"""Weights of another library into one of our models, and back, with an account of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from framework.errors import ModelError
from framework.models.image_start import resize_places
from framework.models.weights.formats import BIAS, KERNEL, Format, detect
from framework.models.weights.links import Link
from framework.models.weights.resize import denormalise, renormalise, resize_kernel, to_grid

__all__ = ["Account", "Target", "fill", "format_of", "to_format"]


@dataclass(frozen=True)
class Target:
    """Where weights go: whose classifier the file's is, and which tube takes the patches of images."""

    source: str
    kernel: int = 0


@dataclass
class Account:
    """What became of every tensor, on both sides."""

    loaded: dict[str, str] = field(default_factory=dict)
    """Our name: how it was changed (empty: not at all)."""
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[tuple[str, str]]:
        """What happened and to which tensor, ours first."""
        loaded = [(change or "loaded", name) for name, change in self.loaded.items()]
        return [*loaded, *(("new", name) for name in self.new), *(("unused", name) for name in self.unused)]


def format_of(tensors: Mapping[str, Tensor]) -> tuple[Format, dict[str, Tensor]]:
    """The format that tensors are in, and the tensors under their full names.

    Hugging Face's models without a classifier leave out the prefix of theirs, which is put back.

    Errors:
        ModelError: a format that is not known.
    """
    found = detect(tensors)
    if found is None and (prefix := _missing_prefix(tensors)):
        tensors = {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
        found = detect(tensors)
    if found is None:
        some = ", ".join(sorted(tensors)[:4])
        raise ModelError(
            f"these weights are in no format that is known here (timm, Hugging Face, Google's .npz, "
            f"torchvision); the first names are {some}"
        )
    return found, dict(tensors)


def _missing_prefix(tensors: Mapping[str, Tensor]) -> str:
    kernel = tensors.get("embeddings.patch_embeddings.projection.weight")
    if kernel is None:
        return ""
    if "embeddings.time_embeddings" in tensors:
        return "timesformer"
    if kernel.ndim == 4:
        return "vit"
    return "vivit" if "embeddings.cls_token" in tensors else "videomae"


@torch.no_grad()
def fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    known: Format,
    target: Target,
    *,
    new: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> Account:
    """Fill a model with a file's tensors; kernels and places are resized where they have to be.

    Args:
        model: the model; what stays new keeps its values.
        tensors: by their names in the file.
        known: their format.
        target: where they go.
        new: patterns (`heads.*`) of our tensors that may be missing in the file.
        unused: patterns of the file's tensors that may be left out.

    Errors:
        ModelError: tensors that are missing or left over and match no pattern, or of another shape.
    """
    state = model.state_dict()
    account = Account()
    taken: set[str] = set()
    ready: dict[str, Tensor] = {}
    for link in _links(model, known):
        ours = [_renamed(name, target) for name in link.ours]
        there = [name for name in link.theirs if name in tensors]
        if not there or not all(name in state for name in ours):
            continue
        if len(there) != len(link.theirs):
            absent = ", ".join(name for name in link.theirs if name not in tensors)
            raise ModelError(f"the file has {there[0]}, but not {absent}, which belongs to it")
        converted = link.to_ours([tensors[name] for name in link.theirs])
        for name, tensor in zip(ours, converted, strict=True):
            ready[name], account.loaded[name] = _fitted(name, tensor, state[name].shape, link.kind)
        taken.update(link.theirs)
    _normalise(ready, known, target)
    for name, tensor in ready.items():
        state[name].copy_(tensor)
    account.new = [name for name in state if name not in ready]
    account.unused = [name for name in tensors if name not in taken]
    _all_named(account, new, unused)
    return account


def to_format(state: Mapping[str, Tensor], known: Format, heads: int, target: Target) -> dict[str, Tensor]:
    """The tensors of a model under the names and in the shapes of a format.

    Errors:
        ModelError: a tensor that the format has no place for.
    """
    own = {name: tensor.detach().float() for name, tensor in state.items()}
    kernel, bias = _renamed(KERNEL, target), _renamed(BIAS, target)
    own[kernel], own[bias] = denormalise(own[kernel], own[bias], known.mean, known.std)
    result: dict[str, Tensor] = {}
    written: set[str] = set()
    for link in _expanded(known, heads, _count_blocks(own), "places.class_token" in own):
        ours = [_renamed(name, target) for name in link.ours]
        if all(name in own for name in ours):
            changed = link.to_theirs([own[name] for name in ours])
            result.update(zip(link.theirs, (tensor.contiguous() for tensor in changed), strict=True))
            written.update(ours)
    others = [name for name in own if name not in written]
    if others:
        raise ModelError(
            f"{known.title} has no place for {_some(others)}; export with `--to safetensors`, which keeps all"
        )
    return result


def _links(model: nn.Module, known: Format) -> Iterator[Link]:
    state = model.state_dict()
    heads = model.size.heads  # type: ignore[union-attr]
    return _expanded(known, heads, _count_blocks(state), "places.class_token" in state)  # type: ignore[arg-type]


def _expanded(known: Format, heads: int, blocks: int, class_token: bool) -> Iterator[Link]:
    """The links of a format, those of blocks once for each."""
    table = known.links if class_token or known.without_class is None else known.without_class
    for link in table(heads):
        numbers = range(blocks) if "{n}" in link.ours[0] else (0,)
        for number in numbers:
            ours = tuple(name.replace("{n}", str(number)) for name in link.ours)
            theirs = tuple(name.replace("{n}", str(number)) for name in link.theirs)
            yield Link(ours, theirs, link.to_ours, link.to_theirs, link.kind)


def _count_blocks(names: Mapping[str, Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)


def _renamed(name: str, target: Target) -> str:
    if name in (KERNEL, BIAS):
        return name.replace("tubes.0.", f"tubes.{target.kernel}.")
    return name.replace("{source}", target.source)


def _fitted(name: str, tensor: Tensor, wanted: torch.Size, kind: str) -> tuple[Tensor, str]:
    """A tensor in the shape that the model has, and how it was changed."""
    if kind == "kernel":
        return resize_kernel(tensor, wanted)
    if kind == "places" and len(wanted) == 4:
        return to_grid(tensor, wanted)
    if kind == "times":
        return resize_places(tensor, wanted)
    if tensor.shape != wanted:
        raise ModelError(
            f"{name} has the shape {list(tensor.shape)} in the file and {list(wanted)} in the model: the "
            "recipe's `model` and the source's classes must say what the file holds"
        )
    return tensor, ""


def _normalise(ready: dict[str, Tensor], known: Format, target: Target) -> None:
    """The kernel for our pixels."""
    kernel, bias = _renamed(KERNEL, target), _renamed(BIAS, target)
    if kernel in ready and bias in ready:
        ready[kernel], ready[bias] = renormalise(ready[kernel], ready[bias], known.mean, known.std)


def _all_named(account: Account, new: Sequence[str], unused: Sequence[str]) -> None:
    """Refuse tensors that nobody said may be missing or left over."""
    missing = [name for name in account.new if not _matches(name, new)]
    over = [name for name in account.unused if not _matches(name, unused)]
    lines = []
    if missing:
        lines.append(
            f"the file has nothing for {_some(missing)}; if they may be new: --new '{_pattern(missing)}'"
        )
    if over:
        lines.append(f"the model has no place for {_some(over)}; if they may go: --unused '{_pattern(over)}'")
    if lines:
        raise ModelError("; ".join(lines))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _pattern(names: Sequence[str]) -> str:
    """What to say on the command line so that all of these are named."""
    roots = dict.fromkeys(name.split(".")[0].split("/")[0] for name in names)
    return ",".join(root if root in names else f"{root}*" for root in roots)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
