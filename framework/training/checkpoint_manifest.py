"""The manifest of a checkpoint: what commits it, and what tells whether it is still whole."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from framework.errors import CheckpointError
from framework.files import hash_file
from framework.training.storage import FileEntry, write_json

__all__ = [
    "AVERAGE",
    "FIXED",
    "MANIFEST",
    "WEIGHT",
    "LaterVersion",
    "Unreachable",
    "checkpoint_folders",
    "file_name",
    "folder_of",
    "looks_whole",
    "newest_valid",
    "read_manifest",
    "step_of",
    "verify",
    "write_manifest",
]

FORMAT = "tubeworks-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"
DIGEST = "blake2b"
"""The manifest's own hash; those of the files stand beside their names."""


FIXED = "fixed.safetensors"
"""Frozen weights and buffers."""
WEIGHT, AVERAGE = "weight", "average"
"""What is kept of every trainable parameter, beside the optimizer's moments."""

READERS = 4
"""Files that are hashed at once."""


class Unreachable(CheckpointError):
    """A checkpoint whose files cannot be reached, which says nothing about them."""


class LaterVersion(CheckpointError):
    """A checkpoint that is not damaged, but of a format that only a later tubeworks reads."""


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def file_name(kind: str, rank: int) -> str:
    """The file of a rank's fragments of a kind."""
    return f"{kind}-{rank:05d}.safetensors"


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders that were committed as checkpoints, oldest first; whether they still verify is open."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name[5:].isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint, with its own hash.

    Errors:
        CheckpointError: it cannot be written.
    """
    manifest = {"format": FORMAT, "version": VERSION, **content}
    write_json(folder / MANIFEST, {**manifest, DIGEST: _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Errors:
        CheckpointError: there is none, or its bytes have changed.
        Unreachable: it cannot be read at the moment.
        LaterVersion: a later version wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            _unreadable(path, error)
        raise CheckpointError(f"{folder} is not a checkpoint: cannot read {MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a checkpoint: {MANIFEST} is of another kind")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise LaterVersion(
            f"{folder} was written in format version {version}, this tubeworks reads up to "
            f"{VERSION}: upgrade it"
        )
    digest = manifest.pop(DIGEST, None)
    if digest != _digest(manifest):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} does not match its own hash")
    return manifest


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: missing files, sizes, hashes; empty if it is whole.

    Errors:
        LaterVersion: a later version wrote it, so nothing can be said.
        CheckpointError: its files cannot be reached at the moment, so nothing can be said.
    """
    return _problems(folder, _wrong_with)


def newest_valid(run: Path) -> Path:
    """The newest checkpoint of a run that verifies; changes nothing.

    Errors:
        CheckpointError: there is none.
    """
    reasons = []
    for folder in reversed(checkpoint_folders(run)):
        problems = verify(folder)
        if not problems:
            return folder
        reasons.append(f"{folder.name}: {'; '.join(problems)}")
    detail = f" ({' | '.join(reasons)})" if reasons else ""
    raise CheckpointError(
        f"no valid checkpoint in {run / 'checkpoints'}{detail}. Train first, or name another run"
    )


def looks_whole(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as its manifest and sizes tell; None: nothing.

    Errors:
        LaterVersion, CheckpointError: as `verify`.
    """
    return "; ".join(_problems(folder, _wrong_size)) or None


def _problems(folder: Path, look: Callable[[Path, FileEntry], str | None]) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except (LaterVersion, Unreachable):
        raise
    except CheckpointError as error:
        return [str(error)]
    entries = manifest["files"]
    with ThreadPoolExecutor(min(READERS, len(entries) or 1)) as pool:  # hashing does not hold the GIL
        found = pool.map(lambda entry: look(folder / entry["name"], entry), entries)
        return [problem for problem in found if problem]


def _wrong_with(path: Path, entry: FileEntry) -> str | None:
    problem = _wrong_size(path, entry)
    if problem is None:
        try:
            if hash_file(path) != entry["blake2b"]:
                problem = f"{path.name} does not match its hash: its bytes have changed"
        except OSError as error:
            problem = _unreadable(path, error)
    return problem


def _wrong_size(path: Path, entry: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return _unreadable(path, error)
    return None if size == entry["bytes"] else f"{path.name} has {size} bytes instead of {entry['bytes']}"


def _unreadable(path: Path, error: OSError) -> str:
    """A file that the disk has lost is damage; one that nobody can reach at the moment is not.

    Errors:
        Unreachable: the latter.
    """
    if error.errno == errno.EIO:
        return f"{path.name} cannot be read: {error}"
    raise Unreachable(
        f"cannot read {path}: {error}. The checkpoint may be whole: nothing was changed. See that the file "
        "system is mounted and readable, then start the same command again"
    ) from error
