"""Promises of the data doctor: what it advises is enough, and it does not complain without a reason."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.data.doctor import STAGE_ADVICE, diagnose


def interval(compute: float, stages: dict[str, float], workers: int) -> dict[str, float]:
    """The metrics of steps that compute so long, beside workers that need so long for their data."""
    making = sum(stages.values()) / workers
    step = max(compute, making)
    wait = (step - compute) / step
    return {"perf/step_s": step, "data/wait_share": wait} | {f"data/{k}_s": v for k, v in stages.items()}


@given(
    st.floats(0.01, 10),
    st.dictionaries(st.sampled_from(sorted(STAGE_ADVICE)), st.floats(0.001, 100), min_size=1),
    st.integers(1, 32),
)
def test_with_the_workers_that_it_asks_for_the_waiting_ends(
    compute: float, stages: dict[str, float], workers: int
) -> None:
    verdict = diagnose(interval(compute, stages, workers), workers, 1, 4)
    if verdict.bound == "compute":
        assert verdict.cores_short == 0
        assert interval(compute, stages, workers)["data/wait_share"] <= 0.05
        return
    assert verdict.bound == max(sorted(stages), key=lambda name: stages[name]) or math.isclose(
        stages[verdict.bound], max(stages.values())
    )
    enough = workers + verdict.cores_short
    assert diagnose(interval(compute, stages, enough), enough, 1, 4).bound == "compute"
    one_less = interval(compute, stages, max(1, enough - 1))
    assert verdict.cores_short == 1 or one_less["data/wait_share"] > 0


def test_the_line_names_stage_cores_and_what_else_helps() -> None:
    stages = {"read": 0.2, "verify": 0.1, "decode": 12.0, "augment": 1.2, "transfer": 0.1}
    verdict = diagnose(interval(1.0, stages, 3), 3, 2, 8)
    assert (verdict.bound, verdict.cores_short) == ("decode", 11)
    assert verdict.text.startswith(
        "decode-bound: waiting 78% of the time, 88% of the workers' time is decode"
    )
    assert (
        "11 more cores per rank (data.workers=14; this machine has 3 beside the rank's own), or"
        in verdict.text
    )
    assert verdict.text.endswith("or shards of preset `fast`, which decode several times faster")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_without_workers_is_told_to_take_some(workers: int) -> None:
    metrics = {"perf/step_s": 2.0, "data/wait_share": 0.5, "data/decode_s": 1.0}
    verdict = diagnose(metrics, workers, 1, 8)
    assert verdict.bound == "decode"
    assert f"data.workers={workers + verdict.cores_short}" in verdict.text
