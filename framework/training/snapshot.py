"""What a rank writes to a checkpoint: its fragments, and on rank 0 what is fixed; as views or as copies.

A save that all wait for takes views and copies nothing. One that goes on in the background takes copies in
host memory, which are made once and filled anew by each save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from framework.training.checkpoint_manifest import FIXED, WEIGHT, file_name
from framework.training.state import TrainState
from framework.training.storage import TensorSpec
from framework.world import World

__all__ = [
    "HostCopies",
    "Share",
    "blocks",
    "full_shape",
    "is_finite",
    "layout",
    "share_of",
]

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""The words of the safetensors format."""


@dataclass
class Share:
    """What one rank has to write: tensors by name, for each file, and where its fragments belong."""

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fragments: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors.values())

    @property
    def host_bytes(self) -> int:
        """What copies of them take: torch gives pinned memory in powers of two."""
        sizes = [
            1 << (tensor.nbytes - 1).bit_length()
            if tensor.nbytes and tensor.device.type != "cpu"
            else tensor.nbytes
            for tensors in self.files.values()
            for tensor in tensors.values()
        ]
        return sum(sizes)


class HostCopies:
    """Copies of a share in host memory; the memory is kept for the next share, which has the same tensors."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def of(self, share: Share) -> Share:
        """The share with copies in place of its views; they stay as they are until the next call."""
        copies = Share(fragments=share.fragments)
        on_device = False
        for file, tensors in share.files.items():
            copies.files[file] = {}
            for name, tensor in tensors.items():
                buffer = self._buffer((file, name), tensor)
                on_device = on_device or tensor.device.type != "cpu"
                buffer.copy_(tensor, non_blocking=True)
                copies.files[file][name] = buffer
        if on_device:
            torch.cuda.synchronize()
        return copies

    def _buffer(self, key: tuple[str, str], like: Tensor) -> Tensor:
        known = self._buffers.get(key)
        if known is None or known.shape != like.shape or known.dtype != like.dtype:
            # pages that cannot be swapped are copied to without the device waiting
            pinned = like.device.type == "cuda"
            known = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
            self._buffers[key] = known
        return known


@torch.no_grad()
def share_of(model: nn.Module, state: TrainState, world: World) -> Share:
    """What this rank writes, as views of the state; all ranks together (ZeRO-3 gathers what is frozen).

    Without ZeRO all ranks own all, and share the work.
    """
    share = Share()
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    for kind in state.kinds:
        tensors = share.files.setdefault(file_name(kind, world.rank), {})
        for fragment, tensor in state.tensors(kind):
            if state.replicated and order[fragment.name] % world.size != world.rank:
                continue
            tensors[fragment.name] = tensor
            if kind == WEIGHT:
                piece = {"name": fragment.name, "start": fragment.start, "count": fragment.count}
                share.fragments.append({**piece, "rank": world.rank})
    fixed = _fixed_tensors(model, world.is_main)
    if world.is_main:
        share.files[FIXED] = fixed
    return share


def layout(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    """How tensors lie in a file: wide elements first, so that all are aligned, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    return [
        TensorSpec(
            name,
            DTYPES[tensors[name].dtype],
            tuple(tensors[name].shape),
            tensors[name].numel() * tensors[name].element_size(),
        )
        for name in order
    ]


def blocks(
    tensors: Mapping[str, Tensor], order: Iterable[TensorSpec], look: Callable[[str, Tensor], None]
) -> Iterator[Any]:
    """The bytes of tensors in the order of their layout, one tensor at a time on the CPU.

    `look` is called with the name and values of each tensor before its bytes are handed over.
    """
    for spec in order:
        tensor = tensors[spec.name].detach().to("cpu").contiguous()
        look(spec.name, tensor)
        yield tensor.reshape(-1).view(torch.uint8).numpy()


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite; needs no memory of the tensor's size."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _fixed_tensors(model: nn.Module, wanted: bool) -> dict[str, Tensor]:
    """Frozen weights and persistent buffers: what no optimizer holds and a loader must not lose.

    All ranks together; only those that have it `wanted` get them.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    fixed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in trainable:
            continue
        cut = _is_cut(tensor)
        with _whole(tensor) if cut else nullcontext():
            if wanted:  # what ZeRO-3 puts together it takes apart again
                fixed[name] = tensor.detach().to("cpu", copy=True) if cut else tensor.detach()
    return fixed


def _is_cut(tensor: Tensor) -> bool:
    """Whether this rank holds a piece of a weight: ZeRO-3 cuts frozen ones, too."""
    return getattr(tensor, "ds_numel", tensor.numel()) != tensor.numel()


def _whole(tensor: Tensor) -> AbstractContextManager[Any]:
    """A while in which all ranks have all of a weight."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([tensor])


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a whole parameter, also where ZeRO-3 keeps a piece of it."""
    return getattr(parameter, "ds_shape", parameter.shape)
