"""System metrics go to the journal."""

from __future__ import annotations

import math
from pathlib import Path

from framework.tracking.journal import Journal, read_journal
from framework.tracking.system import SystemSampler


def test_samples_are_finite_numbers_that_the_journal_takes(tmp_path: Path) -> None:
    sampler = SystemSampler(tmp_path, seconds=0)
    with Journal(tmp_path, 0) as journal:
        journal.write(1, sampler.sample())
    (entry,) = read_journal(tmp_path)
    assert {"system/cpu_percent", "system/memory_percent", "system/run_disk_free_gib"} <= set(entry.metrics)
    assert all(value is not None and math.isfinite(value) for value in entry.metrics.values())
    assert entry.metrics["system/rank0_memory_gib"]


def test_samples_are_not_taken_more_often_than_asked(tmp_path: Path) -> None:
    sampler = SystemSampler(tmp_path, seconds=1000)
    assert sampler.sample()
    assert sampler.sample() == {}
