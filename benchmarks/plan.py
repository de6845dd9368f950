"""What planning costs at a billion samples, and how well the plan shuffles.

python -m benchmarks.plan --out benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from framework.data.plan import Plan, PlanSource
from framework.data.shuffling import shuffle_score

SHARD_SAMPLES = 1000


def plan_of(samples: int, count: int, block: int = 1024) -> Plan:
    """A plan over one source of full shards."""
    shards = np.full(samples // SHARD_SAMPLES, SHARD_SAMPLES, np.int64)
    return Plan([PlanSource("source", count, shards, "benchmark")], seed=0, block=block)


def steps(samples: int, count: int, world: int, number: int) -> dict[str, Any]:
    """Processor milliseconds a step of one rank, over more than one block, and the memory that stays."""
    tracemalloc.start()
    plan = plan_of(samples, count)
    middle = samples // count // 2
    plan.share(middle, rank=0, world=world, micro=0, accumulation=1)
    tracemalloc.reset_peak()
    milliseconds = []
    for step in range(middle + 1, middle + 1 + number):
        began = time.process_time()
        plan.share(step, rank=1 % world, world=world, micro=0, accumulation=1)
        milliseconds.append(1e3 * (time.process_time() - began))
    held, peak = (size / 1e6 for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    return {
        "samples": samples,
        "step": count,
        "ranks": world,
        "mean_ms": statistics.fmean(milliseconds),
        "median_ms": statistics.median(milliseconds),
        "worst_ms": max(milliseconds),
        "held_mb": held,
        "peak_mb": peak,
    }


def scores(count: int, classes: int, block: int) -> dict[str, Any]:
    """The shuffle score on a million samples that lie sorted by class."""
    found = shuffle_score(plan_of(1_000_000, count, block), "source", 1_000_000, classes=classes)
    return {"step": count, "classes": classes, "block": block, "score_by_window_of_steps": found}


def main() -> None:
    """Print the figures as JSON, and write them where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {
        "command": "python -m benchmarks.plan",
        "machine": describe_machine(),
        "steps": [steps(10**9, count, world, 1500) for count, world in ((256, 8), (1024, 64), (4096, 64))],
        "shuffle": [
            scores(count, classes, block)
            for count, classes in ((256, 100), (1024, 1000))
            for block in (1, 256, 1024)
        ],
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
