"""How much host memory is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["available_memory"]


def available_memory() -> int:
    """Bytes of host memory that are free or can be freed, for this process and its control groups.

    Schedulers bound a job by control groups (version 1 or 2), whose limit is lower than the machine's memory.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """What each control group above this process still allows."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top = Path("/sys/fs/cgroup") / controllers
            limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            group = top / name.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(top):
                    break
                with suppress(OSError, ValueError):  # no limit is the word max, and the root has no file
                    most = int((folder / f"memory.{limit}").read_text())
                    now = int((folder / f"memory.{used}").read_text())
                    yield max(0, most - now + _cached(folder))


def _cached(group: Path) -> int:
    """Bytes of a control group that are copies of files and can be dropped."""
    for line in (group / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == "inactive_file":
            return int(value)
    return 0
