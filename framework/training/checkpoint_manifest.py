"""The manifest of a checkpoint: what commits it, and what tells whether it is still whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.errors import CheckpointError
from framework.files import hash_file
from framework.training.storage import write_json

__all__ = ["LaterVersion", "checkpoint_folders", "folder_of", "read_manifest", "verify", "write_manifest"]

FORMAT = "tubeworks-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"
DIGEST = "blake2b"
"""The manifest's own hash; those of the files stand beside their names."""


class LaterVersion(CheckpointError):
    """A checkpoint that is not damaged, but of a format that only a later tubeworks reads."""


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders that were committed as checkpoints, oldest first; whether they still verify is open."""
    return sorted((run / "checkpoints").glob("step-*"))


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
        LaterVersion: a later version wrote it.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
    """
    try:
        manifest = read_manifest(folder)
    except LaterVersion:
        raise
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for entry in manifest["files"]:
        path = folder / entry["name"]
        if not path.is_file():
            problems.append(f"{entry['name']} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{entry['name']} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif hash_file(path) != entry["blake2b"]:
            problems.append(f"{entry['name']} does not match its hash: its bytes have changed")
    return problems
