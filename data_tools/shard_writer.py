"""One shard from its items: read, decode, write, and a record of what happened. Runs in a worker process.

A shard is a USTAR archive without times or owners, so equal items give equal bytes. Each sample is three
members: KEY.<ext> (the media file as it was), KEY.cls (the label), KEY.json (where it came from).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.items import Failure, Item, Unusable
from data_tools.pool import Advance
from data_tools.probe import Media, probe
from framework.data.datasets import KINDS
from framework.data.manifest import SCHEMA, TARGETS
from framework.files import replace_file, replace_text

__all__ = ["ROW", "ShardRecord", "ShardTask", "make_shard", "read_record", "shard_name"]

ROW = (*(name for name in SCHEMA.names if name != "shard"), TARGETS.name)
"""The columns of a row, always with targets: a sample as its shard's worker knows it, before shards have
their final numbers."""

_LARGEST_MEMBER = 8 * 2**30 - 1  # USTAR writes sizes in eleven octal digits


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made in `folder`; `settings` names the run that it belongs to."""

    number: int
    folder: Path
    settings: str
    datasets: tuple[str, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: rows of its samples (columns in the order of `ROW`), and what was left out.

    A shard none of whose items was usable has no file; its `bytes` are 0.
    """

    number: int
    settings: str
    bytes: int
    blake2b: str
    rows: list[list[Any]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)


class _HashingFile:
    """A file opened for writing that hashes what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.blake2b(digest_size=16)

    def write(self, data: bytes) -> int:
        """Hash and write; tarfile asks for no more than this and `tell`."""
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def hexdigest(self) -> str:
        """blake2b (16 bytes, hex) of all that was written."""
        return self._digest.hexdigest()


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


def make_shard(task: ShardTask, advance: Advance) -> ShardRecord:
    """Write the shard (tmp + fsync + rename), then its record; raises OSError where that cannot be done.

    Items that cannot be read or decoded are left out and listed in the record with the reason.
    """
    path = task.folder / shard_name(task.number)
    rows: list[list[Any]] = []
    failed: list[Failure] = []
    digest = ""

    def write(file: BinaryIO) -> None:
        nonlocal digest
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[arg-type]
            for item in task.items:
                try:
                    data, media = _load(item)
                except Unusable as error:
                    failed.append(Failure(item.key, f"{error} ({item.source})"))
                else:
                    rows.append(_add_sample(archive, item, task.datasets[item.dataset], data, media))
                advance()
        digest = hashing.hexdigest()

    replace_file(path, write)
    if not rows:
        path.unlink()
    record = ShardRecord(task.number, task.settings, path.stat().st_size if rows else 0, digest, rows, failed)
    replace_text(_record_path(task.folder, task.number), _dump(record))
    return record


def read_record(folder: Path, number: int, settings: str) -> ShardRecord | None:
    """The record of a shard that an earlier run of the same settings finished; None if there is none."""
    try:
        content = json.loads(_record_path(folder, number).read_bytes())
        failed = [Failure(**failure) for failure in content.pop("failed")]
        record = ShardRecord(**content, failed=failed)
        if record.settings != settings or record.number != number:
            return None
        if record.bytes and (folder / shard_name(number)).stat().st_size != record.bytes:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no record, or half of one: the shard is made again
    return record


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.done"


def _dump(record: ShardRecord) -> str:
    content = {**vars(record), "failed": [{"key": f.key, "reason": f.reason} for f in record.failed]}
    return json.dumps(content)


def _load(item: Item) -> tuple[bytes, Media]:
    if item.reader.size > _LARGEST_MEMBER:
        raise Unusable(f"too large: {item.reader.size} bytes, a member of a shard has at most 8 GiB")
    try:
        data = item.reader.read()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error
    suffix = os.path.splitext(item.source)[1].lower().lstrip(".")
    return data, probe(data, item.kind, suffix)


def _add_sample(archive: tarfile.TarFile, item: Item, dataset: str, data: bytes, media: Media) -> list[Any]:
    offset = archive.offset + tarfile.BLOCKSIZE  # a USTAR header is always one block
    _add_member(archive, f"{item.key}.{media.extension}", data)
    _add_member(archive, f"{item.key}.cls", str(item.label).encode("ascii"))
    about = {
        "dataset": dataset,
        "label": item.label,
        "class": item.class_name,
        "source": item.source,
        "kind": item.kind,
        "width": media.width,
        "height": media.height,
        "frames": media.frames,
        "fps": round(media.fps, 6),
    }
    if item.target_names is not None:
        about |= {"targets": list(item.targets), "target_names": item.target_names}
    _add_member(archive, f"{item.key}.json", json.dumps(about, sort_keys=True).encode("ascii"))
    row = {
        "key": item.key,
        "offset": offset,
        "length": len(data),
        "crc32": zlib.crc32(data),
        "dataset": item.dataset,
        "kind": KINDS.index(item.kind),
        "label": item.label,
        "width": media.width,
        "height": media.height,
        "frames": media.frames,
        "fps": media.fps,
        "keyframes": list(media.keyframes),
        "extension": media.extension,
        "targets": list(item.targets),
    }
    return [row[column] for column in ROW]


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o444
    archive.addfile(info, io.BytesIO(data))
