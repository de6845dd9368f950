"""The report of a sharding run: what was written, what was missing, and what was left out and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.items import Failure
from framework.wording import counted

if TYPE_CHECKING:
    from data_tools.shard_plan import ShardPlan
    from data_tools.shard_writer import ShardRecord

__all__ = ["REPORT_NAME", "ShardReport", "human_bytes", "in_shards", "report_of"]

REPORT_NAME = "report.json"
_SHOWN = 100


@dataclass(frozen=True)
class ShardReport:
    """Counts of samples, shards and bytes; names of missing files; keys of unusable files with the reason."""

    out: str
    written: int
    missing: tuple[str, ...]
    failed: tuple[Failure, ...]
    shards: int
    bytes: int

    def to_json(self) -> str:
        """The report for programs; the same input gives the same text, wherever it was written to."""
        content = {
            "written": self.written,
            "missing": list(self.missing),
            "failed": [{"key": failure.key, "reason": failure.reason} for failure in self.failed],
            "reasons": self.reasons(),
            "shards": self.shards,
            "bytes": self.bytes,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, out: Path, text: str) -> ShardReport:
        """The report that `to_json` wrote."""
        content = json.loads(text)
        failed = tuple(Failure(**failure) for failure in content["failed"])
        numbers = {name: content[name] for name in ("written", "shards", "bytes")}
        return cls(str(out), missing=tuple(content["missing"]), failed=failed, **numbers)

    def reasons(self) -> dict[str, int]:
        """How many were left out for which kind of reason, the most frequent first."""
        kinds = Counter(re.split(r"[:(]", failure.reason, maxsplit=1)[0].strip() for failure in self.failed)
        return dict(sorted(kinds.items(), key=lambda pair: (-pair[1], pair[0])))

    def to_text(self) -> str:
        """The report for people."""
        lines = [
            f"{in_shards(self.written, self.shards)}, {human_bytes(self.bytes)}: {self.out}"
            if self.written
            else "nothing was written: no file could be used"
        ]
        if self.missing:
            lines.append(f"missing ({len(self.missing)}), listed but not there:")
            lines.extend(_first(self.missing))
        if self.failed:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons().items())
            lines.append(f"left out ({len(self.failed)}): {counts}")
            lines.extend(_first([f"{failure.key}: {failure.reason}" for failure in self.failed]))
        return "\n".join(lines)


def report_of(out: Path, plan: ShardPlan, records: Sequence[ShardRecord]) -> ShardReport:
    """What became of a plan, by the records of its shards."""
    failed = [*plan.failed, *(failure for record in records for failure in record.failed)]
    return ShardReport(
        out=str(out),
        written=sum(len(record.rows) for record in records),
        missing=tuple(plan.missing),
        failed=tuple(sorted(failed, key=lambda failure: (failure.key, failure.reason))),
        shards=sum(bool(record.rows) for record in records),
        bytes=sum(record.bytes for record in records),
    )


def _first(lines: Sequence[str]) -> list[str]:
    more = [f"  … and {len(lines) - _SHOWN} more: all are in {REPORT_NAME}"] if len(lines) > _SHOWN else []
    return [f"  {_printable(line)}" for line in lines[:_SHOWN]] + more


def _printable(line: str) -> str:
    """A line whose control characters, which names of files may have, are escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], line)


def in_shards(samples: int, shards: int) -> str:
    """`1 sample in 1 shard`, `5 samples in 2 shards`."""
    return f"{counted(samples, 'sample')} in {counted(shards, 'shard')}"


def human_bytes(count: float) -> str:
    """`count` bytes in the unit that fits (1 MB is 10^6 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
