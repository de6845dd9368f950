"""The report of a sharding run: what was written, what was missing, and what was left out and why."""

from __future__ import annotations

import json
from dataclasses import dataclass

from data_tools.items import Failure

__all__ = ["REPORT_NAME", "ShardReport", "counted", "human_bytes"]

REPORT_NAME = "report.json"


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
            "shards": self.shards,
            "bytes": self.bytes,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """The report for people."""
        lines = [
            f"{counted(self.written, self.shards)}, {human_bytes(self.bytes)}: {self.out}"
            if self.written
            else "nothing was written: no file could be used"
        ]
        if self.missing:
            lines.append(f"missing ({len(self.missing)}), listed but not there:")
            lines.extend(f"  {name}" for name in self.missing)
        if self.failed:
            lines.append(f"left out ({len(self.failed)}):")
            lines.extend(f"  {failure.key}: {failure.reason}" for failure in self.failed)
        return "\n".join(lines)


def counted(samples: int, shards: int) -> str:
    """`1 sample in 1 shard`, `5 samples in 2 shards`."""
    return f"{samples} sample{'s' * (samples != 1)} in {shards} shard{'s' * (shards != 1)}"


def human_bytes(count: float) -> str:
    """`count` bytes in the unit that fits (1 MB is 10^6 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
