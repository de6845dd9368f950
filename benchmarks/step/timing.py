"""Times of device work, with their spread, and the memory that it took."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Budget", "Times", "Workbench"]


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, smallest and largest of `repeats`."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int


class Budget:
    """Wall-clock seconds for the whole benchmark; what does not fit any more is named, not measured."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.skipped: list[str] = []

    def allows(self, name: str, seconds: float) -> bool:
        """Whether work that takes about so long still fits; if not, its name is written down."""
        if time.monotonic() + seconds <= self._end:
            return True
        self.skipped.append(name)
        return False

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return max(0.0, self._end - time.monotonic())


@dataclass(frozen=True)
class Workbench:
    """A device to measure on, and how long to measure."""

    device: torch.device
    warmup: int = 3
    repeats: int = 10
    settle: float = 0.5
    """Seconds of warming up, at least: an idle GPU takes some time to its full clock."""

    def time(self, work: Callable[[], object], repeats: int | None = None) -> Times:
        """Time calls one after another, as in training: with events on a GPU, with a clock elsewhere.

        Before that it is called until clocks and allocator have settled.
        """
        began, count = time.perf_counter(), repeats or self.repeats
        for _ in range(self.warmup):
            work()
        self.wait()
        while time.perf_counter() - began < self.settle:
            work()
            self.wait()
        seconds = self._on_gpu(work, count) if self.device.type == "cuda" else self._on_cpu(work, count)
        return Times(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def _on_gpu(self, work: Callable[[], object], count: int) -> list[float]:
        """The host may be ahead: a call does not begin with an empty queue."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        self.wait()
        return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(marks)]

    def _on_cpu(self, work: Callable[[], object], count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return seconds

    def wait(self) -> None:
        """Wait until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_of(self, work: Callable[[], object]) -> int:
        """Bytes that were allocated at most during a call; 0 where nobody counts."""
        if self.device.type != "cuda":
            work()
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)

    def clear(self) -> None:
        """Give back the memory of what nobody holds any more, and forget what was compiled for it."""
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def memory(self) -> int:
        """Bytes that the device has; of the CPU a few, so that small cases stay small."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return 2 * 2**30
