"""Disks that fail on purpose, to stand in the place of `framework.files.disk` inside a rank."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from framework import files
from framework.files import Disk

PHASES = ("write", "sync", "manifest", "commit", "committed", "prune", "remove", "journal")
"""Where a disk kills its process; in the order in which a save comes by."""


def name_of(descriptor: int) -> str:
    """The path behind a descriptor."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def die() -> NoReturn:
    """As if the machine had lost power, for this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL does not return")


class KillingDisk(Disk):
    """Kills the process at the `count`-th operation (from 1) of a phase, half done where it can be."""

    def __init__(self, phase: str, count: int) -> None:
        self._phase = phase
        self._left = count

    def write(self, descriptor: int, content: Any) -> int:
        path = name_of(descriptor)
        phase = (
            "journal"
            if path.endswith("journal.jsonl")
            else ("manifest" if "MANIFEST" in path else "write")
            if ".saving-" in path
            else ""
        )
        if self._is_time(phase):
            os.write(descriptor, memoryview(content)[: len(content) // 2])
            die()
        return super().write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        path = name_of(descriptor)
        if self._is_time("sync" if path.endswith(".safetensors") else ""):
            die()
        super().sync(descriptor)
        if self._is_time("committed" if path.endswith("/checkpoints") else ""):
            die()

    def rename(self, source: Path, target: Path) -> None:
        phase = "prune" if target.name.startswith(".removing-") else "commit"
        if self._is_time(phase if _is_checkpoint(source) else ""):
            die()
        super().rename(source, target)

    def remove_tree(self, path: Path) -> None:
        if path.name.startswith(".removing-") and self._is_time("remove"):
            next(iter(path.iterdir())).unlink()
            die()
        super().remove_tree(path)

    def _is_time(self, phase: str) -> bool:
        if phase != self._phase:
            return False
        self._left -= 1
        return self._left == 0


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and "step-" in path.name


class FailingDisk(Disk):
    """Fails with `fault` on files whose name has a part in it, from the `after`-th write (from 0) on.

    Faults: `ENOSPC` and `EIO` on writing, `EIO-sync` on syncing, `short` (every write takes a part), `lost`
    (writes that claim to be whole and are not), `slow`, and `EROFS` and `ENOENT` on creating, as where a file
    system turns read-only or vanishes.
    """

    def __init__(self, fault: str, part: str, after: int = 0) -> None:
        self._fault, self._part, self._after = fault, part, after
        self.hits: Counter[str] = Counter()

    def create(self, path: Path) -> int:
        if self._fault in ("EROFS", "ENOENT"):
            self._fail(path.name)
        return super().create(path)

    def write(self, descriptor: int, content: Any) -> int:
        path = name_of(descriptor)
        whole = memoryview(content).cast("B")
        if self._fault == "short" and self._meets(path):
            return super().write(descriptor, whole[: max(1, len(whole) // 2)])
        if self._fault == "lost" and self._meets(path):
            super().write(descriptor, whole[: len(whole) // 2])
            return len(whole)
        if self._fault == "slow" and self._meets(path):
            time.sleep(0.3)
        if self._fault in ("ENOSPC", "EIO"):
            self._fail(path)
        return super().write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        if self._fault == "EIO-sync":
            self._fail(name_of(descriptor))
        super().sync(descriptor)

    def _meets(self, path: str) -> bool:
        if self._part not in path:
            return False
        self.hits[self._fault] += 1
        return self.hits[self._fault] > self._after

    def _fail(self, path: str) -> None:
        if self._meets(path):
            number: int = getattr(errno, self._fault.partition("-")[0])
            raise OSError(number, os.strerror(number), path)


def use(disk: Disk) -> None:
    """Put a disk in place."""
    files.disk = disk
