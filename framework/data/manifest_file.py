"""manifest.json as a file: JSON whose last entry is a checksum of all bytes before it.

The checksum is that of the bytes, not of what they mean, so it costs milliseconds whatever the number of
samples. Manifests of earlier versions have none and are read as before; what one without a checksum holds
besides the entries of those versions can only be damage.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from framework.data.urls import Place
from framework.errors import DataError

__all__ = ["FORMAT", "VERSION", "ManifestFile", "manifest_text", "parse_manifest"]

FORMAT = "tubeworks-manifest"
VERSION = 2
"""The latest; 2 has a column of targets, and is written only where a data set needs it."""
_ENTRIES = ("format", "version", "samples", "shards", "datasets")
_CHECKSUM = "blake2b"
_END = re.compile(rb',\n "blake2b": "([0-9a-f]{32})"\n}\n\Z')
_END_BYTES = 64  # more than the end has


@dataclass(frozen=True)
class ManifestFile:
    """What a manifest.json says, and by which it is known."""

    path: Place
    content: Mapping[str, Any]
    hash: str
    """blake2b (16 bytes, hex) of the whole file."""
    has_checksum: bool

    def field(self, name: str) -> Any:
        """An entry of the file; DataError if it is not there."""
        try:
            return self.content[name]
        except KeyError:
            raise DataError(f"{self.path}: has no {name!r}; copy the folder again") from None


def manifest_text(content: Mapping[str, Any]) -> str:
    """The text of a manifest with its checksum, a new one if there was one; equal contents, equal bytes."""
    entries = {name: value for name, value in content.items() if name != _CHECKSUM}
    body = json.dumps(entries, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{body},\n "{_CHECKSUM}": "{_digest(body.encode("utf-8"))}"\n}}\n'


def parse_manifest(path: Place, raw: bytes) -> ManifestFile:
    """Read the bytes of a manifest.

    Errors:
        DataError: it is no manifest, of a later version, or was changed after it was written.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); copy the folder again or shard anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of shards (format is not {FORMAT!r})")
    version = content.get("version")
    if not isinstance(version, int) or version < 1:
        raise DataError(f"{path}: version {version!r} is not a number from 1; copy the folder again")
    if version > VERSION:
        raise DataError(
            f"{path}: version {version}, but this tubeworks reads up to version {VERSION}: upgrade tubeworks,"
            " or shard the data again with this one"
        )
    return ManifestFile(path, content, _digest(raw), _has_checksum(path, raw, content))


def _has_checksum(path: Place, raw: bytes, content: Mapping[str, Any]) -> bool:
    """Whether a manifest has a checksum; DataError if that is not the one of its bytes."""
    end = _END.search(raw[-_END_BYTES:])
    if end is None and content.keys() <= set(_ENTRIES):
        return False
    if end is None or _digest(raw[: -len(end[0])]) != end[1].decode():
        raise DataError(
            f"{path}: its checksum is not that of what it says: it was changed or damaged after it was "
            "written; copy the folder again or shard anew"
        )
    return True


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
