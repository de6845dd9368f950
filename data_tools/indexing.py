"""Shards that others made (img2dataset, video2dataset, any WebDataset), indexed where they lie.

The tar files are read, never written: beside them come a manifest and a table of samples. Members of one
sample have one key, the name up to the first dot after the last slash, and stand together. Work is recorded
per shard in `DIR/.tubeworks-index`; a killed run is continued by the same command.
"""

from __future__ import annotations

import json
import os
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zlib_ng.zlib_ng import crc32

from data_tools.importers.archive import open_archive, refusal, whole_archive
from data_tools.items import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Failure
from data_tools.pool import Advance, progress_bar, run_tasks
from data_tools.probe import probe
from data_tools.readers import MemberReader, Unusable, display
from data_tools.report import REPORT_NAME, ShardReport
from framework.data.datasets import KINDS, Kind
from framework.data.manifest import MANIFEST_NAME, TARGETS, DatasetInfo, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.errors import DataError
from framework.files import hash_file, replace_text

__all__ = ["IndexOptions", "index_shards"]

_WORK = ".tubeworks-index"
_DIGITS = 7  # of a label that is the number of a class
_SUFFIXES = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}


@dataclass(frozen=True)
class IndexOptions:
    """What the shards in `folder` hold.

    `label` is `cls` (a member of that name), `json:FIELD` (a field of the member `json`) or `none`. With
    `classes` a label is the name of one of them or its number; without, labels that are all numbers are
    taken as they are, and others are numbered by the alphabet. A list of labels makes the set multi-label.
    """

    folder: Path
    name: str
    kind: Kind
    split: str = "train"
    label: str = "cls"
    classes: tuple[str, ...] = ()
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.label not in ("cls", "none") and not self.label.startswith("json:"):
            raise DataError(f"--label-from {self.label!r}: it is cls, none or json:FIELD")


@dataclass(frozen=True)
class _Task:
    path: Path
    kind: Kind
    label: str
    excluded: tuple[tuple[int, str], ...] = ()

    def without(self, place: int, reason: str) -> _Task:
        return replace(self, excluded=(*self.excluded, (place, reason)))

    @property
    def identity(self) -> list[Any]:
        """What a record is good for."""
        status = self.path.stat()
        return [status.st_size, status.st_mtime_ns, self.kind, self.label]

    @property
    def record(self) -> Path:
        return self.path.parent / _WORK / f"{self.path.name}.done"


@dataclass(frozen=True)
class _Sample:
    """The members of a sample: the medium, and where its label is read."""

    key: str
    extension: str
    medium: tarfile.TarInfo | None
    label: tarfile.TarInfo | None
    problem: str = ""


def index_shards(options: IndexOptions) -> ShardReport:
    """Write manifest and table beside the tar files of a folder; what was indexed, and what was left out.

    Raises DataError if there are no tar files or a manifest already, if nothing in them can be used, and for
    labels that are not among the classes.
    """
    folder = Path(os.path.abspath(options.folder))
    shards = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not shards:
        raise DataError(f"{folder}: no tar files here to index; check the path")
    for path in shards:
        if not path.is_file():  # a pipe would never end
            raise DataError(f"{path}: not a file, nor a link to one; take it away or give it another name")
    if (folder / MANIFEST_NAME).exists() and not options.overwrite:
        raise DataError(f"{folder}: has a {MANIFEST_NAME} already; replace it with --overwrite")
    try:
        (folder / _WORK).mkdir(exist_ok=True)
        records = _records(options, [_Task(path, options.kind, options.label) for path in shards])
        return _write(folder, options, records)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be read or written ({error.strerror}); the index comes to"
            " lie beside the shards, so their folder must be writable"
        ) from error


def _records(options: IndexOptions, tasks: Sequence[_Task]) -> list[dict[str, Any]]:
    """What was found in each shard, in their order."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        try:
            record = json.loads(task.record.read_bytes())
            if record["identity"] == task.identity:
                found[task.path.name] = record
        except (OSError, ValueError, KeyError, TypeError):
            continue
    open_tasks = [task for task in tasks if task.path.name not in found]
    with progress_bar("indexing shards", len(open_tasks)) as progress:
        made = run_tasks(_index_shard, open_tasks, options.workers, lambda _: None, blame=_Task.without)
        for done, record in enumerate(made, start=1):
            found[record["name"]] = record
            progress(done)
    return [found[task.path.name] for task in tasks]


def _index_shard(task: _Task, advance: Advance) -> dict[str, Any]:
    rows: list[list[Any]] = []
    failed: list[dict[str, str]] = []
    excluded = dict(task.excluded)
    identity = task.identity
    try:
        for place, sample in enumerate(_samples(task)):
            try:
                if place in excluded:
                    raise Unusable(f"ends the process that decodes it: {excluded[place]}")
                rows.append(_row(task, sample))
            except Unusable as error:
                failed.append({"key": sample.key, "reason": f"{error} ({task.path.name})"})
            advance()
    except tarfile.TarError as error:
        seen = rows or failed
        what = (
            "the archive is damaged from here on" if seen else "not a tar archive, or damaged from its start"
        )
        failed.append({"key": task.path.name, "reason": f"{what}: {error}"})
    record = {
        "name": task.path.name, "identity": identity, "blake2b": hash_file(task.path),
        "rows": rows, "failed": failed,
    }  # fmt: skip
    replace_text(task.record, json.dumps(record))
    return record


def _samples(task: _Task) -> Iterator[_Sample]:
    """The samples of a shard, in their order; each ends where the key changes."""
    with task.path.open("rb") as file, open_archive(file) as archive:
        members: list[tarfile.TarInfo] = []
        damage: tarfile.TarError | None = None
        try:
            for member in whole_archive(archive):
                if member.isdir():
                    continue
                if members and _split(member.name)[0] != _split(members[-1].name)[0]:
                    yield _sample(task, members)
                    members = []
                members.append(member)
        except tarfile.TarError as error:
            damage = error
        if members:
            yield _sample(task, members)
        if damage is not None:
            raise damage


def _split(name: str) -> tuple[str, str]:
    """Key and extension, as WebDataset has them: parted at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension


def _sample(task: _Task, members: Sequence[tarfile.TarInfo]) -> _Sample:
    key = _split(members[0].name)[0]
    for member in members:
        if reason := refusal(member) or _odd_name(member.name):
            what = "" if member is members[0] else f": {display(member.name)!r}"
            return _Sample(display(key), "", None, None, f"{reason}{what}")
    by_extension = {_split(member.name)[1].lower(): member for member in members if member.isreg()}
    media = [name for name in by_extension if name in _SUFFIXES[task.kind]]
    label = by_extension.get("json" if task.label.startswith("json:") else task.label)
    if len(members) != len({member.name for member in members}):
        return _Sample(key, "", None, None, "the same member is there twice")
    if not media:
        what = ", ".join(sorted(_split(member.name)[1] for member in members))
        return _Sample(key, "", None, None, f"no {task.kind} in it (there is {what})")
    if len(media) > 1:
        return _Sample(key, "", None, None, f"several {task.kind}s in it: {', '.join(media)}")
    member = by_extension[media[0]]
    return _Sample(key, _split(member.name)[1], member, label)


def _odd_name(name: str) -> str:
    """What makes a name no key: keys stand in tables, logs and messages."""
    kinds = {unicodedata.category(letter) for letter in name}
    if "Cs" in kinds:  # how Python has bytes that are not UTF-8
        return "refused: its name is not UTF-8"
    if "Cc" in kinds:
        return "refused: its name has control characters"
    return "" if _split(name)[0].rpartition("/")[2] else "refused: its name has nothing before the first dot"


def _row(task: _Task, sample: _Sample) -> list[Any]:
    if sample.medium is None:
        raise Unusable(sample.problem)
    data = _bytes(task.path, sample.medium)
    media = probe(data, task.kind, sample.extension.lower())
    return [
        sample.key, sample.medium.offset_data, len(data), crc32(data), media.width, media.height,
        media.frames, media.fps, list(media.keyframes), sample.extension, _label(task, sample),
    ]  # fmt: skip


_ROW = ("key", "offset", "length", "crc32", "width", "height", "frames", "fps", "keyframes", "extension")


def _bytes(path: Path, member: tarfile.TarInfo) -> bytes:
    return MemberReader(str(path), 0, member.offset_data, member.size).read()


def _label(task: _Task, sample: _Sample) -> str | list[str] | None:
    """The label as it stands in the shard."""
    if task.label == "none":
        return None
    if sample.label is None:
        raise Unusable(f"has no member {task.label.split(':')[0]!r} with its label")
    text = _bytes(task.path, sample.label).decode("utf-8", "replace").strip()
    if task.label == "cls":
        return text
    try:
        value = json.loads(text)[task.label.removeprefix("json:")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unusable(f"its json has no such field ({error!r})") from error
    if isinstance(value, list):
        return [str(part) for part in value]
    return None if value is None else str(value)


def _write(folder: Path, options: IndexOptions, records: Sequence[dict[str, Any]]) -> ShardReport:
    kept = [record for record in records if record["rows"]]
    labels = [_named(row[-1], options.classes) for record in kept for row in record["rows"]]
    multi = any(isinstance(label, list) for label in labels)
    classes = _classes(folder, options.classes, labels)
    numbers = {name: number for number, name in enumerate(classes)}
    columns = _columns(options, kept)
    if multi:
        columns[TARGETS.name] = [sorted({numbers[name] for name in _names(label)}) for label in labels]
    columns["label"] = [-1 if multi or label is None else numbers[str(label)] for label in labels]
    shards = [
        ShardInfo(record["name"], record["identity"][0], record["blake2b"], len(record["rows"]))
        for record in kept
    ]
    report = ShardReport(
        str(folder), len(labels), (), tuple(Failure(**row) for record in records for row in record["failed"]),
        len(shards), sum(shard.bytes for shard in shards),
    )  # fmt: skip
    if not labels:
        return report
    target = "multi" if multi else "single"
    dataset = DatasetInfo(options.name, options.split, options.kind, classes, len(labels), target)
    replace_text(folder / REPORT_NAME, report.to_json())
    if classes:
        replace_text(folder / f"{options.name}.classes.txt", "".join(f"{name}\n" for name in classes))
    write_manifest(folder, columns, shards, [dataset])
    for record in (folder / _WORK).iterdir():
        record.unlink()
    (folder / _WORK).rmdir()
    return report


def _columns(options: IndexOptions, records: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in _ROW}
    for record in records:
        for row in record["rows"]:
            for name, value in zip(_ROW, row, strict=False):
                columns[name].append(value)
    count = len(columns["key"])
    columns["shard"] = [n for n, record in enumerate(records) for _ in record["rows"]]
    columns["dataset"], columns["kind"] = [0] * count, [KINDS.index(options.kind)] * count
    return columns


def _named(label: Any, classes: Sequence[str]) -> Any:
    """A label with numbers replaced by the names of the classes, where those are given."""
    if isinstance(label, list):
        return [_named(part, classes) for part in label]
    if label is None or label in classes or not label.isdecimal() or int(label) >= len(classes):
        return label
    return classes[int(label)]


def _names(label: str | list[str] | None) -> list[str]:
    if label is None:
        return []
    return label if isinstance(label, list) else [label]


def _classes(folder: Path, given: tuple[str, ...], labels: Iterable[Any]) -> tuple[str, ...]:
    """The classes of all labels; numbers stand for themselves, or for one of `given`."""
    present = {name for label in labels for name in _names(label)}
    numeric = bool(present) and all(name.isdecimal() for name in present)
    if given and not present.difference(given):
        return given
    if given:
        wrong = ", ".join(sorted(present.difference(given))[:10])
        raise DataError(f"{folder}: labels that are not in the list of classes: {wrong}")
    if numeric:
        largest = max(present, key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))
        if len(largest.lstrip("0")) > _DIGITS:
            raise DataError(
                f"{folder}: the label {largest[:40]} is no number of a class; name the classes with"
                " --classes, or another --label-from"
            )
        return tuple(str(number) for number in range(int(largest) + 1))
    return tuple(sorted(present))
