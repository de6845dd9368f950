"""Verifying shards: every byte against the checksums of the manifest, and on request every frame."""

from __future__ import annotations

import functools
import hashlib
import mmap
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from zlib_ng.zlib_ng import crc32

from data_tools.coverage import Coverage, class_problems, coverage_of, official_list
from data_tools.pool import Advance, progress_bar, run_tasks
from data_tools.probe import probe
from data_tools.readers import Unusable
from data_tools.report import human_bytes, in_shards
from framework.data.datasets import targets_problem
from framework.data.manifest import MANIFEST_NAME, SAMPLES_NAME, Manifest, SampleInfo
from framework.errors import DataError
from framework.files import hash_file
from framework.wording import counted

__all__ = ["Official", "Problem", "VerifyReport", "verify"]

_BLOCK = 1 << 22
_NO_CHECKSUM = (
    f"{MANIFEST_NAME} has no checksum of its own (an earlier version wrote it): changes to names of classes "
    "are not found; shards that are made or indexed now have one"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as the manifest says; `key` and `offset` (bytes) where it is one sample."""

    file: str
    problem: str
    key: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        place = f", {self.key} at offset {self.offset}" if self.key is not None else ""
        return f"{self.file}{place}: {self.problem}"


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at and what is wrong with it."""

    folder: str
    shards: int
    samples: int
    bytes: int
    decoded: bool
    problems: tuple[Problem, ...]
    coverage: Coverage | None = None
    manifest_checksum: bool = True
    """Whether the manifest has one of its own; that of an earlier version has not, which is no problem."""

    @property
    def is_unreadable(self) -> bool:
        """Whether there is one problem only: the manifest cannot be opened."""
        return not self.shards and bool(self.problems)

    def content(self) -> dict[str, Any]:
        """The report for programs."""
        content = {"ok": not self.problems, **asdict(self)}
        if self.coverage is not None:
            content["coverage"]["percent"] = round(self.coverage.percent, 3)
        return content

    def to_text(self) -> str:
        """The report for people."""
        how = "checksums and all frames" if self.decoded else "checksums"
        size = f"{in_shards(self.samples, self.shards)}, {human_bytes(self.bytes)}"
        head = f"{self.folder}: {size}: {how} verified, {counted(len(self.problems), 'problem', 'no')}"
        unproven = [] if self.manifest_checksum else [f"  {_NO_CHECKSUM}"]
        covered = [self.coverage.to_text()] if self.coverage is not None else []
        return "\n".join([head, *(f"  {problem}" for problem in self.problems), *unproven, *covered])


@dataclass(frozen=True, slots=True)
class _Task:
    folder: str
    shard: int
    decode: bool


@dataclass(frozen=True)
class Official:
    """What the shards are compared with: a list of classes, a list of samples, and for which data set."""

    classes: Path | None = None
    samples: Path | None = None
    dataset: str | None = None


def verify(
    folder: str | Path, *, decode: bool = False, workers: int = 1, official: Official | None = None
) -> VerifyReport:
    """Compare all files of a folder of shards, by path or address, with its manifest and official lists.

    A manifest that cannot be opened (later version, missing shard) is a problem like any other, and the only
    one then reported. Raises nothing for what is wrong with the data.
    """
    try:
        manifest = Manifest.open(folder)
    except DataError as error:
        return VerifyReport(str(folder), 0, 0, 0, decode, (Problem(MANIFEST_NAME, str(error)),))
    problems = list(_table_problems(manifest))
    coverage = _compare(manifest, official, problems) if official else None
    _open.cache_clear()
    tasks = [_Task(str(folder), shard, decode) for shard in range(len(manifest.shards))]
    with progress_bar("verifying", len(manifest)) as progress:
        for found in run_tasks(_verify_shard, tasks, workers, progress):
            problems.extend(found)
    problems.sort(key=lambda problem: (problem.file, problem.offset or 0))
    size = sum(shard.bytes for shard in manifest.shards)
    return VerifyReport(
        str(folder), len(manifest.shards), len(manifest), size, decode, tuple(problems), coverage,
        manifest.has_checksum,
    )  # fmt: skip


def _compare(manifest: Manifest, official: Official, problems: list[Problem]) -> Coverage | None:
    """Compare with official lists; problems are added to those known. Raises DataError for no list."""
    name = official.dataset
    if name is None and len(manifest.datasets) != 1:
        there = ", ".join(dataset.name for dataset in manifest.datasets)
        raise DataError(f"{manifest.folder}: holds {there}: say with --dataset which is to be compared")
    dataset = manifest.datasets[0] if name is None else manifest.dataset(name)
    if official.classes is not None:
        problems += [Problem(MANIFEST_NAME, text) for text in class_problems(dataset, official.classes)]
    if official.samples is None:
        return None
    coverage = coverage_of(manifest, dataset, official_list(official.samples, dataset.split))
    problems += [
        Problem(SAMPLES_NAME, f"another class than the official list: {text}") for text in coverage.relabelled
    ]
    return coverage


def _table_problems(manifest: Manifest) -> Iterator[Problem]:
    expected = manifest.samples_checksum
    if hash_file(manifest.table) != expected:
        yield Problem(SAMPLES_NAME, "its checksum is not that of the manifest: the table was changed")
    shard = manifest.column("shard").astype(numpy.int64)
    counts = numpy.bincount(shard, minlength=len(manifest.shards)).tolist()
    if counts != [entry.samples for entry in manifest.shards] or (numpy.diff(shard) < 0).any():
        yield Problem(SAMPLES_NAME, "its rows do not match the shards of the manifest")
    numbers = manifest.column("dataset").astype(numpy.int64)
    if problem := targets_problem(manifest.datasets, numbers, *manifest.targets()):
        yield Problem(SAMPLES_NAME, problem)


@functools.lru_cache(maxsize=1)
def _open(folder: str) -> Manifest:
    """One manifest per worker process."""
    return Manifest.open(folder)


def _verify_shard(task: _Task, advance: Advance) -> list[Problem]:
    manifest = _open(task.folder)
    shard = manifest.shards[task.shard]
    column = manifest.column("shard")
    first, last = numpy.searchsorted(column, [task.shard, task.shard + 1])
    problems: list[Problem] = []
    if shard.bytes == 0:
        return problems
    try:
        with (
            manifest.shard_path(shard.name).open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data,
        ):
            for index in range(int(first), int(last)):
                sample = manifest.sample(index)
                if problem := _sample_problem(data, sample, task.decode):
                    problems.append(Problem(shard.name, problem, sample.key, sample.offset))
                advance()
            if _digest(data) != shard.blake2b:
                where = "" if problems else ", but all media are whole: labels or tar headers were changed"
                problems.append(Problem(shard.name, f"its checksum is not that of the manifest{where}"))
    except (OSError, DataError) as error:
        problems.append(Problem(shard.name, f"cannot be read: {error}"))
    return problems


def _digest(data: mmap.mmap) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(data), _BLOCK):
        digest.update(data[start : start + _BLOCK])
    return digest.hexdigest()


def _sample_problem(data: mmap.mmap, sample: SampleInfo, decode: bool) -> str:
    """What is wrong with one sample; empty if nothing is."""
    end = sample.offset + sample.length
    if sample.offset < tarfile.BLOCKSIZE or end > len(data):
        return "lies outside the shard"
    payload = data[sample.offset : end]
    if crc32(payload) != sample.crc32:
        return "its bytes changed since it was written (crc32 differs)"
    try:
        header = tarfile.TarInfo.frombuf(
            data[sample.offset - tarfile.BLOCKSIZE : sample.offset], "utf-8", "surrogateescape"
        )
    except tarfile.HeaderError as error:
        return f"no tar header before it ({error})"
    name = f"{sample.key}.{sample.extension}"
    # in shards that others made, a header before this one may hold what does not fit into a plain one
    plain = len(name) <= 100 and name.isascii()
    if header.size != sample.length or (plain and header.name != name):
        return f"the archive has {header.name!r} with {header.size} bytes at this place"
    return _decode_problem(payload, sample) if decode else ""


def _decode_problem(payload: bytes, sample: SampleInfo) -> str:
    try:
        media = probe(payload, sample.kind, sample.extension)
    except Unusable as error:
        return f"does not decode: {error}"
    seen = (media.width, media.height, media.frames, media.keyframes)
    told = (sample.width, sample.height, sample.frames, tuple(sample.keyframes.tolist()))
    names = ("width", "height", "frames", "keyframes")
    wrong = [f"{name} {a} instead of {b}" for name, a, b in zip(names, seen, told, strict=True) if a != b]
    return f"decodes to other than the manifest says: {', '.join(wrong)}" if wrong else ""
