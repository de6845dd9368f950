"""How busy the machine is: numbers for the journal, beside the training's own."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil

__all__ = ["SystemSampler"]

logger = logging.getLogger(__name__)

GIBIBYTE = 1 << 30


class SystemSampler:
    """Samples processor, memory, disk and accelerator of this rank's node, at most every `seconds`.

    `sample()` answers at once (in a few milliseconds) and returns {} in between, so it
    may be asked at every line of the journal. Units: percent, GiB; names begin with `system/`.
    """

    def __init__(self, run: Path, seconds: float = 10.0) -> None:
        self.run = Path(run)
        self.seconds = seconds
        self._next = 0.0
        self._process = psutil.Process(os.getpid())
        self._library = _nvml()
        self._handles = _accelerator_handles(self._library)
        psutil.cpu_percent()  # the first call only sets the mark from which the next one measures

    def sample(self) -> dict[str, float]:
        """The numbers since the last sample, or {} when that was less than `seconds` ago."""
        now = time.monotonic()
        if now < self._next:
            return {}
        self._next = now + self.seconds
        disk = shutil.disk_usage(self.run)
        numbers = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": psutil.virtual_memory().percent,
            "rank0_memory_gib": self._tree_memory() / GIBIBYTE,
            "run_disk_free_gib": disk.free / GIBIBYTE,
            **_accelerators(self._library, self._handles),
        }
        return {f"system/{name}": float(value) for name, value in numbers.items()}

    def _tree_memory(self) -> int:
        """Resident bytes of this process and its data workers."""
        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:  # it has ended in between
                continue
        return total


def _nvml() -> Any:
    """NVIDIA's library for such numbers (`nvidia-ml-py`), or None: it is no dependency."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _accelerator_handles(pynvml: Any) -> list[Any]:
    """NVML handles of all accelerators of this node; empty without the library or a driver."""
    if pynvml is None:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        logger.debug("no accelerator numbers: %s", error)
        return []


def _accelerators(pynvml: Any, handles: list[Any]) -> dict[str, float]:
    """Load, memory and power of each accelerator; the memory of torch's own device without NVML."""
    numbers: dict[str, float] = {}
    if not handles:
        torch = sys.modules.get("torch")  # never import it only for this
        if torch is not None and torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            numbers["gpu_memory_gib"] = (total - free) / GIBIBYTE
        return numbers
    for index, handle in enumerate(handles):
        try:
            numbers[f"gpu{index}_percent"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            numbers[f"gpu{index}_memory_gib"] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / GIBIBYTE
            numbers[f"gpu{index}_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        except pynvml.NVMLError as error:  # a device that fell off the bus must not end the run
            logger.debug("accelerator %d: %s", index, error)
    return numbers
