"""The demo's table, and that it does not call a failure a success."""

from __future__ import annotations

from typing import Any

import pytest

from framework.errors import DataError, TrainingStopped
from launch.demo import check, table


def results(motion: float, digits: float, shuffled: float) -> dict[str, Any]:
    """Results as the demo keeps them, shares of 1."""
    return {
        "ordered": {"sources": {"motion": {"top1": motion}, "digits": {"top1": digits}}},
        "shuffled": {"sources": {"motion": {"top1": shuffled}, "digits": {"top1": digits}}},
    }


def test_the_table_is_aligned_and_says_what_was_measured() -> None:
    lines = table(results(0.951, 0.8, 0.25)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["motion", "95.1", "%", "12.5", "%", "25.0", "%"]
    assert lines[2].split()[:3] == ["digits", "80.0", "%"]


def test_good_results_pass() -> None:
    found = results(0.95, 0.8, 0.4)
    check(found)
    assert found == results(0.95, 0.8, 0.4), "and are left as they are"


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ((0.89, 0.8, 0.4), "motion is below the 90 %"),
        ((0.95, 0.7, 0.4), "digits is below the 75 %"),
        ((0.95, 0.8, 0.9), "does not read time"),
    ],
)
def test_broken_promises_are_failures(numbers: tuple[float, float, float], complaint: str) -> None:
    with pytest.raises(TrainingStopped, match=complaint):
        check(results(*numbers))


def test_a_source_without_a_result_is_a_failure() -> None:
    found = results(0.95, 0.8, 0.4)
    del found["ordered"]["sources"]["digits"]
    with pytest.raises(DataError, match="digits"):
        check(found)
