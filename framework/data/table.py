"""The table of samples in parts: checksums that are verified where a sample is first touched, and summaries.

Hashing a table of 10 million samples takes seconds, and scanning its columns memory, in every process. So the
manifest also holds a checksum of every block of rows, and, of each data set, what must be known before the
first step: samples per shard and per block, and the extremes of labels, frames and rates. A manifest without
them (of an earlier version) is hashed and scanned as a whole; an earlier version ignores them.
"""

from __future__ import annotations

import base64
import hashlib
import mmap
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow
from numpy.typing import NDArray

__all__ = ["BLOCK_ROWS", "BlockSums", "Selection", "Summary", "block_entry", "read_summaries"]

BLOCK_ROWS = 16_384
_DIGEST = 16

Integers = NDArray[np.int64]
Check = Callable[[int], None]


@dataclass(frozen=True)
class Summary:
    """What the samples of a data set have in common."""

    shards: Integers
    """Samples in each shard of the folder."""
    blocks: Integers
    """Samples in each block of rows."""
    label_range: tuple[int, int]
    fewest_frames: int
    unknown_fps: int
    """Samples whose rate is not a number greater than 0."""


def block_entry(batch: pyarrow.RecordBatch, shards: int, datasets: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of the blocks of a table: {"rows", "blake2b", "datasets": {name: summary}}."""
    sums = b"".join(block_sum(batch, start, BLOCK_ROWS) for start in range(0, len(batch), BLOCK_ROWS))
    columns = {name: batch.column(name).to_numpy() for name in ("dataset", "shard", "label", "frames", "fps")}
    blocks = -(-len(batch) // BLOCK_ROWS)
    summaries = {}
    for number, name in enumerate(datasets):
        rows = np.flatnonzero(columns["dataset"] == number)
        if not len(rows):
            continue
        labels, fps = columns["label"][rows], columns["fps"][rows]
        summaries[name] = {
            "shards": _packed(np.bincount(columns["shard"][rows], minlength=shards)),
            "blocks": _packed(np.bincount(rows // BLOCK_ROWS, minlength=blocks)),
            "label_range": [int(labels.min()), int(labels.max())],
            "fewest_frames": int(columns["frames"][rows].min()),
            "unknown_fps": int((~(np.isfinite(fps) & (fps > 0))).sum()),
        }
    return {"rows": BLOCK_ROWS, "blake2b": sums.hex(), "datasets": summaries}


def _packed(counts: Integers) -> str:
    return base64.b64encode(zlib.compress(counts.astype("<u4").tobytes())).decode("ascii")


def _unpacked(text: str) -> Integers:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4").astype(np.int64)


def read_summaries(entry: Mapping[str, Any], shards: int, rows: int) -> dict[str, Summary]:
    """The summaries that `block_entry` made.

    Errors:
        ValueError, KeyError, TypeError, zlib.error: they are malformed, or of another table.
    """
    summaries = {
        name: Summary(
            _unpacked(one["shards"]),
            _unpacked(one["blocks"]),
            (int(one["label_range"][0]), int(one["label_range"][1])),
            int(one["fewest_frames"]),
            int(one["unknown_fps"]),
        )
        for name, one in entry["datasets"].items()
    }
    blocks = -(-rows // int(entry["rows"]))
    for name, summary in summaries.items():
        if len(summary.shards) != shards or len(summary.blocks) != blocks:
            raise ValueError(f"the summary of {name} is of other shards")
        if summary.shards.sum() != summary.blocks.sum():
            raise ValueError(f"the summary of {name} contradicts itself")
    return summaries


def block_sum(batch: pyarrow.RecordBatch, start: int, rows: int) -> bytes:
    """blake2b of the values of some rows, column after column: what a reader sees, not how it is stored."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for column in batch.slice(start, rows).columns:
        _digest_values(digest, column)
    return digest.digest()


def _digest_values(digest: Any, column: pyarrow.Array) -> None:
    if not (pyarrow.types.is_large_list(column.type) or pyarrow.types.is_large_string(column.type)):
        digest.update(np.ascontiguousarray(column.to_numpy()).data)
        return
    _, places, *_ = column.buffers()
    edges = np.frombuffer(places, np.int64)[column.offset : column.offset + len(column) + 1]
    digest.update(np.diff(edges).data)
    if pyarrow.types.is_large_list(column.type):
        values: Any = column.values
        digest.update(np.ascontiguousarray(values.slice(edges[0], edges[-1] - edges[0]).to_numpy()).data)
    elif (text := column.buffers()[2]) is not None:
        digest.update(memoryview(text)[int(edges[0]) : int(edges[-1])])


class BlockSums:
    """Checks each block of rows when it is first needed, once for a process and its forks together."""

    def __init__(self, batch: pyarrow.RecordBatch, entry: Mapping[str, Any]) -> None:
        self._batch = batch
        self.rows = int(entry["rows"])
        self._sums = bytes.fromhex(entry["blake2b"])
        blocks = -(-len(batch) // self.rows)
        if len(self._sums) != blocks * _DIGEST:
            raise ValueError(f"{len(self._sums) // _DIGEST} checksums for {blocks} blocks")
        self._good = mmap.mmap(-1, max(1, blocks))

    def intact(self, row: int) -> bool:
        """Whether the block of a row is what was written."""
        block = row // self.rows
        if not self._good[block]:
            found = block_sum(self._batch, block * self.rows, self.rows)
            if found != self._sums[block * _DIGEST : (block + 1) * _DIGEST]:
                return False
            self._good[block] = 1
        return True


class Selection:
    """Places of a data set's samples in the table, ascending, looked up in one block of rows at a time.

    `check(row)` raises where the block of a row was changed.
    """

    def __init__(
        self, dataset: NDArray[np.uint16], number: int, summary: Summary, rows: int, check: Check
    ) -> None:
        self._dataset = dataset
        self._number = number
        self._rows = rows
        self._check = check
        self._ends = np.cumsum(summary.blocks)
        self._whole = int(self._ends[-1]) == len(dataset)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: Integers) -> Integers: ...
    def __getitem__(self, index: int | Integers) -> int | Integers:
        if isinstance(index, np.ndarray):
            return np.array([self._place(int(one)) for one in index.ravel()], np.int64).reshape(index.shape)
        return self._place(int(index))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        places = np.flatnonzero(self._dataset == self._number)
        return places.astype(np.int64 if dtype is None else dtype, copy=False)

    def tolist(self) -> list[int]:
        """All places."""
        return self.__array__().tolist()

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a selection of {len(self)}")
        if self._whole:
            return index
        block = int(np.searchsorted(self._ends, index, side="right"))
        first = block * self._rows
        self._check(first)
        here = np.flatnonzero(self._dataset[first : first + self._rows] == self._number)
        before = int(self._ends[block - 1]) if block else 0
        return first + int(here[index - before])
