"""Samples that a run must not feed again: RUN/quarantine.jsonl.

One JSON object a line, appended, never rewritten:

    {"version": 1, "source": "k400", "index": 6, "key": "k400/abc", "shard": "shard-000000.tar",
     "offset": 512, "reason": "…", "from_step": 40}

From step `from_step` on, the plan's substitute takes the place of the sample. A line with `"lifted": true`
lets it back in from its `from_step` on. Of the lines about a sample whose `from_step` has been reached, the
last one counts. What holds in a step is therefore a function of the file and the step number alone: a run
that goes on from a checkpoint feeds what the uninterrupted run fed, and a line that is added later changes no
step before its `from_step`, which the hash inside each checkpoint (`Quarantine.digest`) makes sure of.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from framework.errors import DataError
from framework.files import sync_folder

__all__ = ["Quarantine", "Quarantined", "append_quarantine", "quarantine_path", "read_quarantine"]

VERSION = 1


@dataclass(frozen=True)
class Quarantined:
    """A sample (`index` counts in its source's selection), why, and the first step that goes without it."""

    source: str
    index: int
    key: str
    shard: str
    offset: int
    reason: str
    from_step: int
    lifted: bool = False
    """The sample is let back in from `from_step` on."""


class Quarantine:
    """Which samples are out, at which steps; grows while a run trains, in the same way on all ranks."""

    def __init__(self, entries: Iterable[Quarantined] = ()) -> None:
        self._entries: list[Quarantined] = []
        self._by_sample: dict[tuple[str, int], list[Quarantined]] = {}
        self.add(entries)

    @property
    def entries(self) -> tuple[Quarantined, ...]:
        """All entries in the order of the file."""
        return tuple(self._entries)

    def __len__(self) -> int:
        """How many samples were ever named."""
        return len(self._by_sample)

    def add(self, entries: Iterable[Quarantined]) -> None:
        """Take in more entries; the later one counts where several are about a sample and a step."""
        for entry in entries:
            self._entries.append(entry)
            self._by_sample.setdefault((entry.source, entry.index), []).append(entry)

    def holding(self, source: str, index: int, step: int) -> Quarantined | None:
        """The entry that keeps a sample out of a step, or None."""
        reached = [entry for entry in self._by_sample.get((source, index), ()) if entry.from_step <= step]
        return reached[-1] if reached and not reached[-1].lifted else None

    def held(self, step: int) -> list[Quarantined]:
        """The entries that keep samples out of a step, ordered by source and index."""
        found = (self.holding(source, index, step) for source, index in sorted(self._by_sample))
        return [entry for entry in found if entry is not None]

    def any_of(self, source: str, indices: Sequence[int], step: int) -> bool:
        """Whether one of the samples is out at a step."""
        return bool(self._by_sample) and any(self.holding(source, index, step) for index in indices)

    def digest(self, before_step: int) -> str:
        """A hash of what held in the steps 0 … before_step - 1, whatever was added for later ones."""
        periods = {
            f"{source}/{index}": found
            for source, index in sorted(self._by_sample)
            if (found := self._periods(source, index, before_step))
        }
        return hashlib.blake2b(json.dumps(periods, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _periods(self, source: str, index: int, before_step: int) -> list[list[int]]:
        """[first, end) of the steps below `before_step` in which a sample was out, ascending."""
        steps = {entry.from_step for entry in self._by_sample[source, index]}
        edges = [*sorted(step for step in steps if step < before_step), before_step]
        periods: list[list[int]] = []
        for first, end in itertools.pairwise(edges):
            if self.holding(source, index, first) is None:
                continue
            if periods and periods[-1][1] == first:
                periods[-1][1] = end
            else:
                periods.append([first, end])
        return periods


def quarantine_path(run: Path) -> Path:
    """Where the quarantine of a run lies."""
    return Path(run) / "quarantine.jsonl"


def read_quarantine(run: Path) -> Quarantine:
    """The quarantine of a run, empty where there is none; a torn last line never took effect.

    Errors:
        DataError: the file cannot be read, is damaged, or a later version wrote it.
    """
    path = quarantine_path(run)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Quarantine()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the permissions") from error
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return Quarantine(_entry(path, number, line) for number, line in enumerate(lines, 1))


def append_quarantine(run: Path, entries: Iterable[Quarantined]) -> None:
    """Add entries to the file, durable when this returns; what a killed writer left of a line is cut off.

    Only whoever holds the run's lock may call it: rank 0 of its training, or a command while none works.

    Errors:
        DataError: the file cannot be written.
    """
    path = quarantine_path(run)
    text = "".join(_line(entry) for entry in entries).encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            end = file.read().rfind(b"\n") + 1
            file.seek(end)
            file.truncate()
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}. A run that goes on must know which "
            "samples it may not feed: free space or grant write permission, then start the same command again"
        ) from error


def _line(entry: Quarantined) -> str:
    content: dict[str, Any] = {"version": VERSION, **asdict(entry)}
    if not entry.lifted:
        del content["lifted"]
    return json.dumps(content, ensure_ascii=False) + "\n"


def _entry(path: Path, number: int, line: bytes) -> Quarantined:
    advice = "restore the file, or use a new --run folder"
    try:
        content: Mapping[str, Any] = json.loads(line)
        version = int(content["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: not an entry of a quarantine ({error!r}); {advice}") from error
    if version > VERSION:
        raise DataError(
            f"{path}:{number}: version {version}, this tubeworks knows up to {VERSION}: upgrade it"
        )
    try:
        values = {field.name: content[field.name] for field in fields(Quarantined) if field.name in content}
        entry = Quarantined(**values)
        whole = isinstance(entry.source, str) and int(entry.index) >= 0 and int(entry.from_step) >= 0
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}:{number}: an entry is malformed ({error}); {advice}") from error
    if not whole:
        raise DataError(f"{path}:{number}: an entry is malformed; {advice}")
    return entry
