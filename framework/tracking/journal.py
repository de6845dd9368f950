"""The journal: every number of a run, one JSON object a line, in the run folder.

It is the only thing that training writes its metrics to; MLflow, tables and plots are made from it. A line is

    {"step": 20, "time": 1767225600.25, "metrics": {"train/loss": 2.1}, "attempt": 1}

`metrics` holds finite numbers or null; the names of the nulls stand in `nonfinite`. A line with `"event":
"start"` and no metrics says from which step an attempt went on. Lines are appended with one write each, so a
killed process leaves at most one torn line, which the next `Journal` repairs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework import files
from framework.errors import TubeworksError

__all__ = ["Entry", "Journal", "complete_lines", "journal_path", "last_attempt", "parse_line", "read_journal"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of the journal."""

    step: int
    time: float
    """Seconds since 1970."""
    metrics: dict[str, float | None]
    attempt: int
    nonfinite: tuple[str, ...] = ()
    event: str | None = None


def journal_path(run: Path) -> Path:
    """Where the journal of a run lies."""
    return Path(run) / "journal.jsonl"


class Journal:
    """Appends to the journal of a run; only rank 0 has one.

    `start_step` is the number of steps that were complete when this attempt began: entries of earlier
    attempts beyond it are dropped by `read_journal`, because they are replayed.

    Errors:
        TubeworksError: the file cannot be opened or written (no permission, no space left).
    """

    def __init__(self, run: Path, attempt: int, start_step: int | None = None) -> None:
        self.path = journal_path(run)
        self.attempt = attempt
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _repair(self._file, self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if start_step is not None:
            self._append({"step": int(start_step), "metrics": {}, "event": "start"})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step; what is not finite becomes null and is named in `nonfinite`."""
        values = {name: float(value) for name, value in metrics.items()}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        line: dict[str, Any] = {
            "step": int(step),
            "metrics": {name: None if name in nonfinite else value for name, value in values.items()},
        }
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._append(line)

    def close(self) -> None:
        """Force everything onto the disk and close the file; a second call does nothing."""
        if self._file < 0:
            return
        try:
            files.disk.sync(self._file)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: dict[str, Any]) -> None:
        whole = {"step": line.pop("step"), "time": time.time(), **line, "attempt": self.attempt}
        text = json.dumps(whole, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            with _locked(self._file):
                size = os.fstat(self._file).st_size
                written = files.disk.write(self._file, text)
                if written != len(text):  # a disk that fills up takes part of a line: leave whole lines only
                    os.ftruncate(self._file, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _cannot_write(self.path, error) from error


def read_journal(run: Path) -> list[Entry]:
    """The entries of a run as one uninterrupted training would have written them.

    An attempt that starts again from step s replays what earlier attempts did beyond s: their entries there
    are dropped. Where two attempts still wrote the same metric of the same step, the later one counts. The
    lines that only mark a start are left out. A torn last line is ignored.

    Errors:
        TubeworksError: the run has no journal.
    """
    path = journal_path(run)
    if not path.is_file():
        raise TubeworksError(f"{path} does not exist: {run} is not the folder of a run that has begun")
    lines, _ = complete_lines(path, 0)
    entries = [entry for entry in map(parse_line, lines) if entry is not None]
    return _latest_wins(_without_replayed(entries))


def last_attempt(run: Path) -> int:
    """The attempt that wrote last; 0 without one."""
    path = journal_path(run)
    if not path.is_file():
        return 0
    lines, _ = complete_lines(path, 0)
    return max((entry.attempt for entry in map(parse_line, lines) if entry is not None), default=0)


def complete_lines(path: Path, offset: int, limit: int = -1) -> tuple[list[bytes], int]:
    """The whole lines from byte `offset` on, about `limit` bytes at most, and the offset behind them."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(limit)
        if 0 < limit == len(data):
            data += file.readline()  # never stop inside a line, however long it is
    end = data.rfind(b"\n") + 1
    return data[:end].splitlines(keepends=True), offset + end


def parse_line(line: bytes) -> Entry | None:
    """One line as an entry; None (and a warning) for a line that is not one."""
    try:
        raw = json.loads(line)
        return Entry(
            step=int(raw["step"]),
            time=float(raw["time"]),
            metrics=dict(raw["metrics"]),
            attempt=int(raw["attempt"]),
            nonfinite=tuple(raw.get("nonfinite", ())),
            event=raw.get("event"),
        )
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("a line of the journal cannot be read and is left out (%s): %.80r", error, line)
        return None


def _without_replayed(entries: list[Entry]) -> list[Entry]:
    """Drop what an earlier attempt wrote beyond the step from which a later one went on."""
    resumed: dict[int, int] = {}  # attempt -> last step that it did not replay
    for entry in entries:
        resumed.setdefault(entry.attempt, entry.step if entry.event == "start" else entry.step - 1)
    kept = []
    for entry in entries:
        later = [step for attempt, step in resumed.items() if attempt > entry.attempt]
        if entry.event is None and (not later or entry.step <= min(later)):
            kept.append(entry)
    return kept


def _latest_wins(entries: list[Entry]) -> list[Entry]:
    """Where the same metric of the same step was written by two attempts, keep the later one's."""
    newest: dict[tuple[int, str], int] = {}
    for entry in entries:
        for name in entry.metrics:
            newest[entry.step, name] = max(entry.attempt, newest.get((entry.step, name), 0))
    kept = []
    for entry in entries:
        metrics = {
            name: value for name, value in entry.metrics.items() if newest[entry.step, name] == entry.attempt
        }
        if metrics or not entry.metrics:
            nonfinite = tuple(name for name in entry.nonfinite if name in metrics)
            kept.append(Entry(entry.step, entry.time, metrics, entry.attempt, nonfinite))
    return kept


def _repair(file: int, path: Path) -> None:
    """End the file with a whole line: complete a last one that only lacks its newline, cut off a torn one."""
    with _locked(file):
        size = os.fstat(file).st_size
        if size == 0 or os.pread(file, 1, size - 1) == b"\n":
            return
        start = _start_of_last_line(file, size)
        tail = os.pread(file, size - start, start)
        if parse_line(tail) is not None:
            os.write(file, b"\n")
            return
        logger.warning("%s ended in a torn line of %d bytes, which is cut off", path, size - start)
        os.ftruncate(file, start)


def _start_of_last_line(file: int, size: int, block: int = 65536) -> int:
    """Offset of the first byte behind the last newline."""
    end = size
    while end > 0:
        begin = max(0, end - block)
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Keep other writers (an evaluation beside the training) out; file systems without locks go without."""
    held = False
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
        held = True
    try:
        yield
    finally:
        if held:
            fcntl.flock(file, fcntl.LOCK_UN)


def _cannot_write(path: Path, error: OSError) -> TubeworksError:
    return TubeworksError(
        f"{path} cannot be written: {error.strerror or error}. Without its journal a run would lose its "
        "numbers: free space or grant write permission to the run folder, then start the same command again."
    )
