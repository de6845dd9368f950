"""What a training waits for, in one line: computed from what its steps and workers really took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from framework.wording import counted, plural

__all__ = ["STAGE_ADVICE", "Verdict", "diagnose"]

ENOUGH = 0.05
"""Waiting for data up to this share of the time is no complaint."""

STAGE_ADVICE = {
    "read": "faster or nearer storage of the shards, or a local copy",
    "verify": "more cores: checksums take long only where samples are far larger than what is used of them",
    "decode": "shards of preset `fast`, which decode several times faster",
    "augment": "a smaller data.sources.*.augment.randaugment, or shards with a shorter side",
    "transfer": "fewer, larger micro-batches (train.accumulation)",
}
"""What helps besides more workers, by the stage that takes longest."""


@dataclass(frozen=True)
class Verdict:
    """`bound` is "compute", or the stage that a training waits for; `text` says it in one line."""

    bound: str
    cores_short: int
    """Data workers, of a core each, that every rank lacks; 0 if it does not wait."""
    text: str


def diagnose(metrics: Mapping[str, float], workers: int, ranks_here: int, cores: int) -> Verdict:
    """The verdict over a logging interval of a rank.

    `metrics` are those of `Meters.collect`: perf/step_s, data/wait_share, and data/STAGE_s, seconds a step
    over all workers of the rank. While a step computes, w workers make w seconds of data per second: with
    stages of S seconds and C seconds of computing a step, S / C workers keep up. `workers` is data.workers,
    `ranks_here` and `cores` are those of this machine.
    """
    stages = {stage: metrics.get(f"data/{stage}_s", 0.0) for stage in STAGE_ADVICE}
    wait, step = metrics["data/wait_share"], metrics["perf/step_s"]
    made = sum(stages.values())
    computing = max(step * (1 - wait), 1e-9)
    busy = min(1.0, made / (max(1, workers) * max(step, 1e-9)))
    if wait <= ENOUGH or made == 0:
        makers = counted(max(1, workers), "worker")
        text = f"keeps up: waiting {wait:.0%} of the time, {makers} a rank {busy:.0%} busy"
        return Verdict("compute", 0, text)
    stage = max(stages, key=lambda name: stages[name])
    needed = max(math.ceil(made / computing * (1 - 1e-9)), workers + 1)  # what rounding adds is no worker
    short = needed - workers
    free = cores // max(1, ranks_here) - 1
    room = "" if needed <= free else f"; this machine has {max(0, free) or 'none'} beside the rank's own"
    more = f"{short} more {plural('core', short)} per rank"
    return Verdict(
        stage,
        short,
        f"{stage}-bound: waiting {wait:.0%} of the time, {stages[stage] / made:.0%} of the workers' time is "
        f"{stage}; {more} (data.workers={needed}{room}), or {STAGE_ADVICE[stage]}",
    )
