"""One shard from its items: read, decode, write, and a record of what happened. Runs in a worker process.

A shard is a USTAR archive without times or owners, so equal items give equal bytes. Each sample is three
members: KEY.<ext> (the media, as they were or encoded anew), KEY.cls (the label), KEY.json (its origin).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from zlib_ng.zlib_ng import crc32

from data_tools.items import Failure, Item
from data_tools.pool import Advance
from data_tools.presets import Preset
from data_tools.probe import Media, probe
from data_tools.readers import Unusable
from data_tools.shard_plan import ShardPlan, open_plan
from data_tools.transcode import transcode_image, transcode_video
from framework.data.datasets import KINDS
from framework.data.manifest import SCHEMA, TARGETS
from framework.files import replace_file

__all__ = [
    "ROW",
    "ShardRecord",
    "ShardTask",
    "forget_plan",
    "load",
    "make_shard",
    "part_name",
    "read_record",
]

ROW = (*(name for name in SCHEMA.names if name != "shard"), TARGETS.name)
"""The columns of a row, always with targets: a sample as its shard's worker knows it, before shards have
their final numbers."""

_LARGEST_MEMBER = 8 * 2**30 - 1  # USTAR writes sizes in eleven octal digits


@dataclass(frozen=True)
class ShardTask:
    """One shard of the plan in `folder`; `excluded` are items that end the processes that decode them."""

    number: int
    folder: Path
    excluded: tuple[tuple[int, str], ...] = ()

    def without(self, place: int, reason: str) -> ShardTask:
        """The task with one more item left out, and why."""
        return replace(self, excluded=(*self.excluded, (place, reason)))


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: rows of its samples (columns in the order of `ROW`), and what was left out.

    A shard none of whose items was usable has no file; its `bytes` are 0.
    """

    number: int
    plan: str
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


def part_name(number: int) -> str:
    """The file name of a shard of a plan, before those without samples are left out of the count."""
    return f"part-{number:06d}.tar"


def make_shard(task: ShardTask, advance: Advance) -> ShardRecord:
    """Write the shard (tmp + fsync + rename), then its record; raises OSError where that cannot be done.

    Items that cannot be read or decoded are left out and listed in the record with the reason.
    """
    plan = _plan(task.folder)
    path = task.folder / part_name(task.number)
    excluded = dict(task.excluded)
    rows: list[list[Any]] = []
    failed: list[Failure] = []
    digest = ""

    def write(file: BinaryIO) -> None:
        nonlocal digest
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[arg-type]
            for place, item in enumerate(plan.items(task.number)):
                try:
                    if place in excluded:
                        raise Unusable(f"ends the process that decodes it: {excluded[place]}")
                    data, media = load(item, plan.preset)
                except Unusable as error:
                    failed.append(Failure(item.key, f"{error} ({item.source})"))
                else:
                    rows.append(_add_sample(archive, item, plan.datasets[item.dataset].name, data, media))
                advance()
        digest = hashing.hexdigest()

    replace_file(path, write, rivals=True)
    size = path.stat().st_size if rows else 0
    if not rows:
        path.unlink()
    record = ShardRecord(task.number, plan.digest, size, digest, rows, failed)
    text = _dump(record)
    record_path = _record_path(task.folder, task.number)
    replace_file(record_path, lambda file: file.write(text.encode()), rivals=True)
    return record


@functools.lru_cache(maxsize=1)
def _plan(folder: Path) -> ShardPlan:
    """One plan per process; `forget_plan` where it may have changed."""
    return open_plan(folder)


def forget_plan() -> None:
    """Read the plan anew next time: another one may have come to the same folder."""
    _plan.cache_clear()


def read_record(plan: ShardPlan, number: int, *, merging: bool = False) -> ShardRecord | None:
    """The record of a shard of the plan that is finished; None if there is none.

    While shards are being merged their files may have other names already, and are not looked for.
    """
    try:
        content = json.loads(_record_path(plan.folder, number).read_bytes())
        failed = [Failure(**failure) for failure in content.pop("failed")]
        record = ShardRecord(**content, failed=failed)
        if record.plan != plan.digest or record.number != number:
            return None
        size = (plan.folder / part_name(number)).stat().st_size if record.bytes and not merging else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no record, or half of one: the shard is made again
    return record if size in (None, record.bytes) else None


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.done"


def _dump(record: ShardRecord) -> str:
    content = {**vars(record), "failed": [{"key": f.key, "reason": f.reason} for f in record.failed]}
    return json.dumps(content)


def load(item: Item, preset: Preset) -> tuple[bytes, Media]:
    """The bytes of a sample as they are to be stored, and what they decode to; Unusable with the reason."""
    if item.reader.size > _LARGEST_MEMBER and item.segment is None:
        raise Unusable(f"too large: {item.reader.size} bytes, a member of a shard has at most 8 GiB")
    suffix = os.path.splitext(item.source)[1].lower().lstrip(".")
    try:
        if item.kind == "video" and not (preset.keeps_bytes and item.segment is None):
            return transcode_video(item.reader, preset, item.segment)
        data = item.reader.read()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error
    if preset.keeps_bytes:
        return data, probe(data, item.kind, suffix)
    return transcode_image(data, preset, suffix)


def _add_sample(archive: tarfile.TarFile, item: Item, dataset: str, data: bytes, media: Media) -> list[Any]:
    offset = archive.offset + tarfile.BLOCKSIZE  # a USTAR header is always one block
    _add_member(archive, f"{item.key}.{media.extension}", data)
    _add_member(archive, f"{item.key}.cls", str(item.label).encode("ascii"))
    about: dict[str, Any] = {
        **(item.about or {}),
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
    if item.segment is not None:
        about["segment"] = list(item.segment)
    if item.target_names is not None:
        about |= {"targets": list(item.targets), "target_names": item.target_names}
    _add_member(archive, f"{item.key}.json", json.dumps(about, sort_keys=True).encode("ascii"))
    row = {
        "key": item.key,
        "offset": offset,
        "length": len(data),
        "crc32": crc32(data),
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
