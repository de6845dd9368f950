"""A short run of `python -m benchmarks.fuzz`: no hang, no crash, no wrong sample, every input named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fuzz.campaigns import (
    Outcome,
    archives,
    bytes_in_shards,
    decoders,
    files,
    silent_libraries,
    tables,
)
from benchmarks.fuzz.damage import BROKEN


@pytest.mark.parametrize(
    ("campaign", "count"),
    [(bytes_in_shards, 60), (decoders, 40), (files, 40), (archives, 12), (tables, 16)],
)
def test_damage_is_refused_by_name_or_harmless(
    campaign: Callable[[Path, int, int], list[Outcome]], count: int, tmp_path: Path
) -> None:
    silent_libraries()
    outcomes = campaign(tmp_path, count, 7)
    assert len(outcomes) >= count // 4
    assert [one for one in outcomes if one.outcome.startswith("WRONG")] == []
    refused = [one for one in outcomes if one.outcome == "refused"]
    assert refused
    assert all(one.said and one.name for one in refused)
    if campaign in (decoders, files):
        hopeless = {one.damage for one in refused} & set(BROKEN)
        assert len(hopeless) >= len(BROKEN) - 1, "some decoders fill what is cut off with grey"
