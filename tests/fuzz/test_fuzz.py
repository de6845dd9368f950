"""A short run of `python -m benchmarks.fuzz`: no hang, no crash, no wrong sample, every input named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
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
from benchmarks.fuzz.served import served_shards
from benchmarks.fuzz.strange import Strange, strange_archives, strange_shards


@pytest.mark.parametrize(
    ("campaign", "count"),
    [(bytes_in_shards, 60), (decoders, 40), (files, 40), (archives, 18), (served_shards, 108), (tables, 18)],
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


@pytest.mark.parametrize(("make", "count", "kinds"), [(strange_archives, 18, 6), (strange_shards, 108, 36)])
def test_every_kind_of_strange_member_comes_in_a_whole_archive(
    make: Callable[..., list[Strange]], count: int, kinds: int
) -> None:
    made = make(np.random.default_rng(0), count)
    whole = {one.what for one in made if one.what not in ("a damaged header", "cut off")}
    assert (len(made), len(whole)) == (count, kinds)
