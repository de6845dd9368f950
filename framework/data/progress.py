"""What each data worker is at, in memory that its rank reads: who is stuck, and on which sample."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

__all__ = [
    "STAGES",
    "Board",
    "Doing",
    "begin_sample",
    "in_worker",
    "report_to",
    "rest",
    "stage",
]

STAGES = ("read", "verify", "decode", "augment")
"""Stages of a sample; on the board they are 1, 2, …, and 0 is between samples."""

_FIELDS = 4  # change counter, stage, source, index


@dataclass(frozen=True)
class Doing:
    """What a worker is at: `stage` is "" between samples; `changes` grows with every sign of life."""

    changes: int
    stage: str
    source: int
    index: int


class Board:
    """One row a worker, in anonymous memory that is shared with forks."""

    def __init__(self, workers: int) -> None:
        memory = mmap.mmap(-1, max(1, workers) * _FIELDS * 8)
        self.rows = np.frombuffer(memory, np.int64).reshape(-1, _FIELDS)

    def read(self, slot: int) -> Doing:
        """What a worker is at; of one that is running, it may be a moment old."""
        changes, number, source, index = (int(value) for value in self.rows[slot])
        return Doing(changes, STAGES[number - 1] if number else "", source, index)


_row: np.ndarray | None = None


def report_to(board: Board, slot: int) -> None:
    """This process is a worker from now on, and reports in a slot of the board."""
    global _row
    row = board.rows[slot]
    row[:] = (row[0] + 1, 0, 0, 0)
    _row = row


def begin_sample(source: int, index: int) -> None:
    """Work on a sample begins; `source` is a number that the maker of the items understands."""
    if _row is not None:
        _row[1] = 0
        _row[2], _row[3] = source, index


def stage(name: str) -> None:
    """The sample enters a stage."""
    if _row is not None:
        _row[1] = STAGES.index(name) + 1
        _row[0] += 1


def rest() -> None:
    """A sign of life between samples."""
    if _row is not None:
        _row[1] = 0
        _row[0] += 1


def in_worker() -> bool:
    """Whether this process is a data worker."""
    return _row is not None
