"""The files of a run folder and its checkpoints, with a message for the user where they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from framework.errors import CheckpointError
from framework.files import hash_file, replace_text

__all__ = [
    "FileEntry",
    "explain_os_error",
    "write_file",
    "write_json",
    "write_text",
]

FileEntry = dict[str, Any]
"""`{"name", "bytes", "blake2b"}` of a file inside a checkpoint."""


def write_file(path: Path, write: Callable[[Path], None]) -> FileEntry:
    """Let `write` fill `path`, sync it to the disk and describe it by size and hash.

    Errors:
        CheckpointError: the disk is full, the folder is not writable, the device fails.
    """
    with explain_os_error(path):
        write(path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return {"name": path.name, "bytes": path.stat().st_size, "blake2b": hash_file(path)}


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: after a crash there is the old one or the new one, never a part.

    Errors:
        CheckpointError: the disk is full, the folder is not writable, the device fails.
    """
    with explain_os_error(path):
        replace_text(path, text)


@contextmanager
def explain_os_error(path: Path) -> Iterator[None]:
    """Turn an `OSError` (or safetensors' wrapping of one) about `path` into a message for the user."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_advice(path, error.errno, str(error))) from error
    except SafetensorError as error:  # has no number, only the system's text
        number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise CheckpointError(_advice(path, number, str(error))) from error


def _advice(path: Path, number: int | None, text: str) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(path.parent)
        left = f"{free / 2**20:.0f} MiB are free there" if free is not None else "its free space is unknown"
        return (
            f"no space left while writing {path}: {left}. Free space or move the run folder, then start the "
            "same command again: it goes on from the last committed checkpoint"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"cannot write {path}: {text}. Give the user of this job write permission there, or choose "
            "another --run folder"
        )
    if number in (errno.EEXIST, errno.ENOTDIR):
        return f"cannot write {path}: {text}. Remove what is in its place, or choose another --run folder"
    return f"cannot write {path}: {text}"


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
