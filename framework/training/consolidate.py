"""One safetensors file of all weights, from a checkpoint of any number of ranks and any ZeRO stage.

Weights are never put together in memory: the pieces of a tensor lie in the ranks' files as plain ranges of
bytes, and are copied block by block to where they belong. Memory does not grow with the model. No torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework import files
from framework.errors import CheckpointError
from framework.training.checkpoint_manifest import AVERAGE, FIXED, WEIGHT, file_name, read_manifest, verify
from framework.training.storage import FileEntry, TensorSpec, explain_os_error, write_tensors

__all__ = ["TensorFile", "consolidate"]

BLOCK = 1 << 24
HEADER_LIMIT = 1 << 28
WIDTHS = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Bytes of an element, where more than one."""


def consolidate(checkpoint: Path, target: Path, ema: bool = False) -> FileEntry:
    """Write all weights of a checkpoint to one file, float32, frozen weights and buffers included.

    Args:
        checkpoint: folder of a checkpoint, which is verified first.
        target: a file that does not exist yet; it appears when it is complete.
        ema: the moving averages of the trainable weights in place of the weights.

    Errors:
        CheckpointError: the checkpoint is not whole or keeps no averages, or the file cannot be written.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists and is not overwritten: remove it, or choose another name")
    if problems := verify(checkpoint):
        raise CheckpointError(f"{checkpoint} is not whole: {'; '.join(problems)}")
    manifest = read_manifest(checkpoint)
    kind = AVERAGE if ema else WEIGHT
    if kind not in manifest["kinds"]:
        raise CheckpointError(f"{checkpoint} holds no moving average: the run had no train.ema_decay")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with ExitStack() as stack:
            reader = _Reader(checkpoint, manifest, kind, stack)
            entry = write_tensors(temporary, reader.specs, reader.blocks(), _metadata(manifest, kind))
        with explain_os_error(target):
            files.disk.rename(temporary, target)
            files.sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return {**entry, "name": target.name}


def _metadata(manifest: Mapping[str, Any], kind: str) -> dict[str, str]:
    """What the file says about itself."""
    known = {key: str(manifest[key]) for key in ("step", "recipe", "plan") if key in manifest}
    text = {"recipe_yaml": manifest["recipe_yaml"]} if "recipe_yaml" in manifest else {}
    return {"format": "pt", "made_by": "tubeworks ckpt consolidate", "weights": kind, **known, **text}


class TensorFile:
    """A safetensors file whose tensors are read as ranges of bytes.

    Errors:
        CheckpointError: it cannot be read, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        length = int.from_bytes(self._read(0, 8), "little")
        if length > HEADER_LIMIT:
            raise CheckpointError(f"{path} is no safetensors file: its header has {length} bytes")
        self._data = 8 + length
        try:
            header = json.loads(self._read(8, length))
            self.specs = {
                name: TensorSpec(
                    name,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
            self._starts = {name: int(header[name]["data_offsets"][0]) for name in self.specs}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error

    def blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in blocks."""
        start, end = self._starts[name], self._starts[name] + self.specs[name].bytes
        for place in range(start, end, BLOCK):
            yield self._read(self._data + place, min(BLOCK, end - place))

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    def _read(self, place: int, count: int) -> bytes:
        try:
            content = os.pread(self._descriptor, count, place)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from error
        if len(content) != count:
            raise CheckpointError(f"{self.path} ends at byte {place + len(content)}: it is damaged")
        return content


@dataclass(frozen=True)
class _Piece:
    start: int
    count: int
    rank: int


class _Reader:
    """The whole tensors of a checkpoint as a stream of bytes."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], kind: str, stack: ExitStack) -> None:
        self._folder, self._kind, self._stack = folder, kind, stack
        self._pieces: dict[str, list[_Piece]] = {}
        for entry in manifest["fragments"]:
            piece = _Piece(entry["start"], entry["count"], entry["rank"])
            self._pieces.setdefault(entry["name"], []).append(piece)
        self._open: dict[str, TensorFile] = {}
        self._fixed = self._file(FIXED)
        trained = []
        for name, shape in manifest["shapes"].items():
            trained.append(TensorSpec(name, "F32", tuple(shape), 4 * math.prod(shape)))
        # wide elements first, so that all are aligned
        order = [*trained, *self._fixed.specs.values()]
        self.specs = sorted(order, key=lambda spec: (-WIDTHS.get(spec.dtype, 1), spec.name))

    def blocks(self) -> Iterator[bytes]:
        """The bytes of all tensors in the order of `specs`."""
        for spec in self.specs:
            if spec.name in self._fixed.specs:
                yield from self._fixed.blocks(spec.name)
            else:
                yield from self._trained(spec)

    def _trained(self, spec: TensorSpec) -> Iterator[bytes]:
        place = 0
        for piece in sorted(self._pieces.get(spec.name, []), key=lambda piece: piece.start):
            if piece.start != place:
                break
            yield from self._file(file_name(self._kind, piece.rank)).blocks(spec.name)
            place += piece.count
        if place * 4 != spec.bytes:
            raise CheckpointError(
                f"{self._folder} holds {place} of {spec.bytes // 4} elements of {spec.name}"
            )

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self._folder / name)
            self._stack.callback(self._open[name].close)
        return self._open[name]
