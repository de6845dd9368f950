"""The files of a run folder and its checkpoints, with a message for the user where they cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from framework import files
from framework.errors import CheckpointError

__all__ = [
    "Abandoned",
    "FileEntry",
    "TensorSpec",
    "append_json",
    "explain_os_error",
    "make_folder",
    "write_json",
    "write_tensors",
    "write_text",
]

PIECE = 1 << 24

FileEntry = dict[str, Any]
"""`{"name", "bytes", "blake2b"}` of a file inside a checkpoint."""


class TensorSpec(NamedTuple):
    """A tensor of a safetensors file: its name, element type in that format's words, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Abandoned(Exception):
    """Writing was given up because somebody asked for it."""


def write_tensors(
    path: Path,
    tensors: Sequence[TensorSpec],
    blocks: Iterable[Any],
    metadata: Mapping[str, str] | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> FileEntry:
    """Write a safetensors file from a stream of bytes, sync it to the disk, and describe it.

    Size and hash are those of the bytes that were handed over, so whatever the disk makes of them shows.

    Args:
        path: the file; one that exists is overwritten.
        tensors: what the file holds, in the order of the bytes, wide elements before narrow ones.
        blocks: the little-endian bytes of all tensors, cut in any way.
        metadata: for the header.
        abandoned: asked now and then; True ends the writing.

    Errors:
        CheckpointError: the disk is full, the folder is not writable, the device fails.
        Abandoned: `abandoned` said so.
    """
    digest = hashlib.blake2b(digest_size=16)
    expected = 0
    with explain_os_error(path):
        descriptor = files.disk.create(path)
        try:
            for block in chain([_header(tensors, metadata)], blocks):
                for piece in _pieces(block):
                    if abandoned():
                        raise Abandoned
                    digest.update(piece)
                    files.write_all(descriptor, piece)
                    expected += len(piece)
            files.disk.sync(descriptor)
            found = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if found != expected:
            raise OSError(errno.EIO, f"it has {found} bytes after {expected} were written")
    return {"name": path.name, "bytes": expected, "blake2b": digest.hexdigest()}


def _header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    """The head of a safetensors file: the length of its JSON (8 bytes), and the JSON, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.bytes],
        }
        place += tensor.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(block: Any) -> Iterator[memoryview]:
    """Parts of a block that are written and hashed without keeping other threads waiting for long."""
    whole = memoryview(block).cast("B")
    for start in range(0, len(whole), PIECE):
        yield whole[start : start + PIECE]


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Errors:
        CheckpointError: it cannot be made.
    """
    with explain_os_error(path):
        files.disk.make_folder(path)


def append_json(path: Path, value: Any) -> None:
    """Add a line of JSON to a file.

    Errors:
        CheckpointError: the file cannot be written.
    """
    with explain_os_error(path):
        files.append_line(path, json.dumps(value, ensure_ascii=False))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: after a crash there is the old one or the new one, never a part.

    Errors:
        CheckpointError: the disk is full, the folder is not writable, the device fails.
    """
    with explain_os_error(path):
        files.replace_text(path, text)


@contextmanager
def explain_os_error(path: Path) -> Iterator[None]:
    """Turn an `OSError` about `path` into a message for the user."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_advice(path, error.errno, error.strerror or str(error))) from error


def _advice(path: Path, number: int | None, text: str) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(path.parent)
        left = f"{free / 2**20:.0f} MiB are free there" if free is not None else "its free space is unknown"
        return (
            f"no space left while writing {path}: {left}. Free space or choose another place, then start the "
            "same command again; a training goes on from its last committed checkpoint"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"cannot write {path}: {text}. Give the user of this job write permission there, or choose "
            "another --run folder"
        )
    if number in (errno.EEXIST, errno.ENOTDIR):
        return f"cannot write {path}: {text}. Remove what is in its place, or choose another --run folder"
    return f"cannot write {path}: {text}. Check the path and its disk, or choose another --run folder"


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
