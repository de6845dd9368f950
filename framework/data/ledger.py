"""What a run really fed: RUN/ledger.bin, from which `tubeworks data audit` proves that every epoch was whole.

Each rank notes what leaves its loader, not what the plan says should. Before a checkpoint is committed the
ranks hand their notes to rank 0, which appends one *segment* for the steps since the last one. So a
checkpoint of step k exists only if the ledger is on the disk up to step k, wherever a run is killed. An
attempt that goes on from step s begins with a *start* record: segments from step s on, of attempts before it,
were thrown away together with the weights that they had made, and the reader leaves them out.

A segment holds, for each source, one 64-bit sum a step over (place in the step, epoch, sample), which proves
order and content against the plan and does not depend on the number of ranks; for each epoch the set of
samples, as gaps between ascending indices, deflated: under three bits a sample, next to nothing where whole
blocks were used up; and every substitution in full.

The file is a row of records: magic, length and crc32 (little-endian), a JSON header, and binary columns.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framework.data.randomness import mix_arrays, stream_key
from framework.errors import DataError
from framework.files import sync_folder

__all__ = [
    "Ledger",
    "Record",
    "append_record",
    "ledger_path",
    "read_ledger",
    "segment_record",
    "start_record",
    "step_sum",
    "unpack_ids",
]

VERSION = 1
MAGIC = b"TWLG"
_FRAME = struct.Struct("<4sIII")  # magic, bytes of the header, bytes of all columns, crc32 of both

Integers = NDArray[np.int64]


@dataclass
class Record:
    """One record: `header["kind"]` is "start" or "segment"; `columns` are named in it."""

    header: dict[str, Any]
    columns: dict[str, bytes] = field(default_factory=dict)


class Ledger:
    """What one rank has fed since its notes were last handed over."""

    def __init__(self, first_step: int) -> None:
        self._begin(first_step)

    def _begin(self, first_step: int) -> None:
        self._first = first_step
        self._rows: dict[str, list[tuple[Integers, Integers]]] = {}
        self._sums: dict[str, dict[int, int]] = {}
        self._replaced: dict[str, list[list[int]]] = {}

    def note(
        self, step: int, source: str, place: int, epoch: Any, planned: Any, used: Any, repeats: int = 1
    ) -> None:
        """Note the rows of one source in a micro-batch: `place` is where they begin in the global step.

        `epoch`, `planned` (what the plan asked for) and `used` (what was fed) are integers of shape (rows,).
        What is noted are samples, each of which was fed in `repeats` rows, one after another.

        Errors:
            DataError: those rows are not of one sample.
        """
        rows = np.array([epoch, planned, used], np.int64).reshape(3, -1, repeats)  # (3, samples, repeats)
        if (rows != rows[:, :, :1]).any():
            raise DataError(
                f"source {source}, step {step}: {repeats} rows from place {place} on are not of one sample, "
                "which data.sources.*.repeats promises: a defect of the loader; please report it"
            )
        (epoch, planned, used), place = rows[:, :, 0], place // repeats
        sums = self._sums.setdefault(source, {})
        sums[step] = (sums.get(step, 0) + step_sum(source, place, epoch, used)) & (2**64 - 1)
        replaced = np.flatnonzero(planned != used)
        self._replaced.setdefault(source, []).extend(
            [step, place + int(row), int(epoch[row]), int(planned[row]), int(used[row])] for row in replaced
        )
        kept = planned == used
        self._rows.setdefault(source, []).append((epoch[kept], used[kept]))

    def take(self, stop: int) -> dict[str, Any]:
        """The notes up to (not including) step `stop`, ready to be sent to rank 0; begins new ones."""
        sources = {}
        for source, rows in self._rows.items():
            epochs = np.concatenate([epoch for epoch, _ in rows])
            used = np.concatenate([index for _, index in rows])
            sources[source] = {
                "sums": [self._sums[source].get(step, 0) for step in range(self._first, stop)],
                "fed": {int(epoch): used[epochs == epoch] for epoch in np.unique(epochs)},
                "replaced": self._replaced.get(source, []),
            }
        taken = {"first": self._first, "stop": stop, "sources": sources}
        self._begin(stop)
        return taken


def step_sum(source: str, place: int, epoch: Integers, index: Integers) -> int:
    """The 64-bit sum of a part of a step, over hashes of (place, epoch, index); sums of parts add up."""
    places = place + np.arange(len(index), dtype=np.int64)
    words = mix_arrays(stream_key("ledger", source), places, epoch, index)
    return int(np.add.reduce(words, dtype=np.uint64)) if len(index) else 0


def start_record(step: int, attempt: int, ranks: int, plan: str, sources: Mapping[str, Any]) -> Record:
    """An attempt begins at `step`; `sources` holds {"count", "total"} of each: samples a step and in all."""
    return Record(
        {
            "kind": "start",
            "step": step,
            "attempt": attempt,
            "ranks": ranks,
            "plan": plan,
            "sources": dict(sources),
        }
    )


def segment_record(shares: Sequence[Mapping[str, Any]]) -> Record:
    """What all ranks have taken out of their ledgers for the same steps, as one record."""
    first, stop = shares[0]["first"], shares[0]["stop"]
    record = Record({"kind": "segment", "first": first, "stop": stop, "ranks": len(shares), "sources": {}})
    for source in shares[0]["sources"]:
        parts = [share["sources"][source] for share in shares]
        sums = np.add.reduce([np.array(part["sums"], np.uint64) for part in parts], dtype=np.uint64)
        record.columns[f"{source}/sums"] = sums.astype("<u8").tobytes()
        epochs = {}
        for epoch in sorted({epoch for part in parts for epoch in part["fed"]}):
            fed = np.concatenate([part["fed"][epoch] for part in parts if epoch in part["fed"]])
            ids, counts = np.unique(fed, return_counts=True)
            record.columns[f"{source}/{epoch}"] = pack_ids(ids)
            twice = {str(index): int(count) for index, count in zip(ids, counts, strict=True) if count > 1}
            epochs[str(epoch)] = {"samples": len(ids), "doubled": twice}
        replaced = sorted(row for part in parts for row in part["replaced"])
        record.header["sources"][source] = {"epochs": epochs, "replaced": replaced}
    return record


def pack_ids(ids: Integers) -> bytes:
    """Ascending, different indices in few bytes: the gaps, one byte each where they fit, deflated."""
    gaps = np.diff(ids, prepend=-1) - 1
    small = np.minimum(gaps, 255).astype(np.uint8)
    large = gaps[gaps >= 255].astype("<i8")
    return struct.pack("<Q", len(ids)) + zlib.compress(small.tobytes() + large.tobytes(), 6)


def unpack_ids(data: bytes) -> Integers:
    """What `pack_ids` packed."""
    (count,) = struct.unpack_from("<Q", data)
    raw = zlib.decompress(data[8:])
    gaps = np.frombuffer(raw, np.uint8, count).astype(np.int64)
    gaps[gaps == 255] = np.frombuffer(raw, "<i8", offset=count)
    return np.cumsum(gaps + 1) - 1


def ledger_path(run: Path) -> Path:
    """Where the ledger of a run lies."""
    return Path(run) / "ledger.bin"


def append_record(run: Path, record: Record) -> None:
    """Add a record, durable when this returns; what a killed writer left of one is cut off.

    Only rank 0 of the training that holds the run may call it.

    Errors:
        DataError: the file cannot be written, or is damaged before its end: nothing is cut off then.
    """
    path = ledger_path(run)
    content = {"version": VERSION, "time": time.time(), **record.header}
    content["columns"] = {name: len(data) for name, data in record.columns.items()}
    header = json.dumps(content, separators=(",", ":")).encode()
    columns = b"".join(record.columns.values())
    frame = _FRAME.pack(MAGIC, len(header), len(columns), zlib.crc32(columns, zlib.crc32(header)))
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            end = _end_of_records(file.fileno())
            if _is_followed(file.fileno(), end):
                raise _damaged(path, end)
            file.truncate(end)
            file.seek(end)
            file.write(frame + header + columns)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}. Free space or grant write permission to "
            "the run folder, then start the same command again: it goes on from the last committed checkpoint"
        ) from error


def _end_of_records(descriptor: int) -> int:
    """Where the last whole record ends, by the lengths in the frames alone."""
    size, offset = os.fstat(descriptor).st_size, 0
    while len(frame := os.pread(descriptor, _FRAME.size, offset)) == _FRAME.size:
        magic, header, columns, _ = _FRAME.unpack(frame)
        end = offset + _FRAME.size + header + columns
        if magic != MAGIC or end > size:
            break
        offset = end
    return offset


def _is_followed(descriptor: int, end: int) -> bool:
    """Whether a whole record lies behind `end`: then the file was damaged there, and not torn by a kill."""
    tail = os.pread(descriptor, os.fstat(descriptor).st_size - end, end)
    place = tail.find(MAGIC, 1)
    while place >= 0:
        first = place + _FRAME.size
        if first <= len(tail):
            _, header, columns, checksum = _FRAME.unpack(tail[place:first])
            body = tail[first : first + header + columns]
            if header and len(body) == header + columns and zlib.crc32(body) == checksum:
                return True
        place = tail.find(MAGIC, place + 1)
    return False


def _damaged(path: Path, offset: int) -> DataError:
    return DataError(
        f"{path}: the record at byte {offset} is damaged: what was fed from there on cannot be proven; "
        "restore the file"
    )


def read_ledger(run: Path) -> Iterator[Record]:
    """The records in the order in which they were written; a torn last one is left out.

    Errors:
        DataError: there is no ledger, it cannot be read, or a record in it was damaged.
    """
    path = ledger_path(run)
    try:
        with path.open("rb") as file:
            size, offset = os.fstat(file.fileno()).st_size, 0
            while len(frame := file.read(_FRAME.size)) == _FRAME.size:
                magic, header, columns, checksum = _FRAME.unpack(frame)
                if magic == MAGIC and offset + _FRAME.size + header + columns > size:
                    if _is_followed(file.fileno(), offset):
                        raise _damaged(path, offset)
                    return
                data = file.read(header + columns)
                if magic != MAGIC or zlib.crc32(data) != checksum:
                    raise _damaged(path, offset)
                offset = file.tell()
                yield _record(path, data, header)
            if not MAGIC.startswith(frame[: len(MAGIC)]):  # nothing that was torn while it was written
                raise _damaged(path, offset)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: {run} is not the folder of a run that has begun, or one of a version "
            "that kept no ledger"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check the permissions") from error


def _record(path: Path, data: bytes, header: int) -> Record:
    content = json.loads(data[:header])
    if content["version"] > VERSION:
        raise DataError(
            f"{path} has version {content['version']}, this tubeworks knows up to {VERSION}: upgrade it"
        )
    columns, offset = {}, header
    for name, length in content["columns"].items():
        columns[name] = data[offset : offset + length]
        offset += length
    return Record(content, columns)
