"""Promises of the quarantine: a function of file and step, the same after any stop, and safe to append to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framework.data.loader import Batch, training_batches
from framework.data.quarantine import (
    Quarantine,
    Quarantined,
    append_quarantine,
    quarantine_path,
    read_quarantine,
)
from framework.data.sources import build_plan, open_sources
from framework.errors import DataError
from framework.world import World

ENTRY = Quarantined("moves", 6, "moves/006", "shard-000000.tar", 512, "checksum", 2)


def test_entries_hold_from_their_step_on_until_they_are_lifted() -> None:
    quarantine = Quarantine([ENTRY, replace(ENTRY, from_step=5, lifted=True)])
    held = [step for step in range(8) if quarantine.holding("moves", 6, step)]
    assert held == [2, 3, 4]
    assert quarantine.holding("stills", 6, 3) is None
    assert not quarantine.any_of("moves", [5, 7], 3)
    assert quarantine.any_of("moves", [5, 6], 3)
    assert quarantine.held(4) == [ENTRY]
    assert quarantine.held(5) == []


entries = st.builds(
    lambda index, step, lifted: replace(ENTRY, index=index, from_step=step, lifted=lifted),
    st.integers(0, 3),
    st.integers(0, 9),
    st.booleans(),
)


@given(st.lists(entries, max_size=8), st.integers(0, 10), st.data())
def test_the_digest_is_that_of_what_held_before_a_step(
    lines: list[Quarantined], before: int, data: st.DataObject
) -> None:
    quarantine = Quarantine(lines)
    more = data.draw(st.lists(entries, max_size=4))
    grown = Quarantine([*lines, *more])

    def history(one: Quarantine) -> list[bool]:
        return [one.holding("moves", i, step) is not None for step in range(before) for i in range(4)]

    same = history(quarantine) == history(grown)
    assert (quarantine.digest(before) == grown.digest(before)) is same


def test_files_keep_what_was_written_whatever_became_of_the_last_line(tmp_path: Path) -> None:
    assert len(read_quarantine(tmp_path)) == 0
    other = replace(ENTRY, index=7, key="moves/007 é", from_step=3)
    append_quarantine(tmp_path, [ENTRY])
    with quarantine_path(tmp_path).open("a") as file:
        file.write('{"version": 1, "source": "mov')  # killed while it wrote
    assert read_quarantine(tmp_path).entries == (ENTRY,)
    append_quarantine(tmp_path, [other])
    assert read_quarantine(tmp_path).entries == (ENTRY, other)
    assert json.loads(quarantine_path(tmp_path).read_text().splitlines()[0])["from_step"] == 2


@pytest.mark.parametrize(
    "line",
    ["3", "{", '{"version": 1}', '{"version": 2, "source": "a"}', '{"version": 1, "source": 4, "index": -1}'],
)
def test_damaged_files_are_errors_that_name_the_line(tmp_path: Path, line: str) -> None:
    append_quarantine(tmp_path, [ENTRY])
    with quarantine_path(tmp_path).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"quarantine\.jsonl:2: "):
        read_quarantine(tmp_path)


def batches_of(make_recipe: Callable, shards: Path, quarantine: Quarantine, **settings: int) -> list[Batch]:
    recipe = make_recipe(shards, data={"workers": settings.get("workers", 0)})
    sources = open_sources(recipe)
    start = settings.get("start", 0)
    return list(
        training_batches(
            recipe,
            sources,
            build_plan(recipe, sources),
            World(),
            start_step=start,
            stop_step=5,
            quarantine=quarantine,
        )
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_without_the_sample_from_its_step_on_wherever_they_start(
    workers: int, shards: Path, make_recipe: Callable
) -> None:
    plain = batches_of(make_recipe, shards, Quarantine())
    steps = [batch.step for batch in plain if 6 in batch.groups["moves"].index]
    assert len(steps) == 2, "20 places are two epochs of 10 clips"
    quarantine = Quarantine([replace(ENTRY, from_step=steps[1])])
    whole = batches_of(make_recipe, shards, quarantine, workers=workers)
    assert [batch.step for batch in whole if 6 in batch.groups["moves"].index] == steps[:1]
    (event,) = [event for batch in whole for event in batch.events]
    assert (event["key"], event["reason"]) == ("moves/006", "checksum")
    for start in (steps[1], steps[1] - 1):
        for batch in batches_of(make_recipe, shards, quarantine, start=start):
            assert torch.equal(batch.groups["moves"].pixels, whole[batch.step].groups["moves"].pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_were_made_ahead_keep_to_what_is_found_meanwhile(
    workers: int, shards: Path, make_recipe: Callable
) -> None:
    recipe = make_recipe(shards, data={"workers": workers, "prefetch": 4})
    sources = open_sources(recipe)
    batches = training_batches(
        recipe, sources, build_plan(recipe, sources), World(), start_step=0, stop_step=5
    )
    first = next(batches)
    out = int(first.groups["moves"].index[0])
    batches.quarantine.add([replace(ENTRY, index=out, from_step=0)])
    again = batches.renewed(first)
    rest = list(batches)
    assert all(out not in batch.groups["moves"].index for batch in [again, *rest])
    fresh = batches_of(make_recipe, shards, batches.quarantine)
    for one, other in zip([again, *rest], fresh, strict=True):
        assert torch.equal(one.groups["moves"].pixels, other.groups["moves"].pixels)
        assert one.events == other.events
