"""`RUN/bad_nodes.json`: nodes that failed the pre-flight of a run, why, and until when they are avoided."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from framework.files import replace_text
from framework.watch.control import excluded_nodes

__all__ = ["BadNode", "add_bad_nodes", "avoided_nodes", "bad_nodes"]


@dataclass(frozen=True)
class BadNode:
    """A node, what was wrong with it, and from when to when that counts (seconds since 1970)."""

    node: str
    reason: str
    since: float
    until: float
    job_id: str = ""


def bad_nodes(run: Path, now: float | None = None) -> list[BadNode]:
    """The nodes that are avoided now; a file that cannot be read counts as empty."""
    now = time.time() if now is None else now
    return [one for one in _read(run) if one.until > now]


def add_bad_nodes(run: Path, reasons: Mapping[str, str], hours: float, job_id: str) -> None:
    """Avoid nodes for so many hours from now; what was known of them before is replaced."""
    now = time.time()
    kept = [one for one in bad_nodes(run, now) if one.node not in reasons]
    found = [BadNode(node, reason, now, now + hours * 3600, job_id) for node, reason in reasons.items()]
    entries = [asdict(one) for one in sorted([*kept, *found], key=lambda one: one.node)]
    replace_text(run / "bad_nodes.json", json.dumps(entries, indent=1) + "\n")


def avoided_nodes(run: Path) -> list[str]:
    """Nodes that a run keeps off: bad ones, and those of `launch ctl RUN exclude NODE`."""
    return sorted({*(one.node for one in bad_nodes(run)), *excluded_nodes(run)})


def _read(run: Path) -> list[BadNode]:
    try:
        return [
            BadNode(**entry) for entry in json.loads((run / "bad_nodes.json").read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError):
        return []
