"""Promises of the ledger and its audit: exactly once over any history of kills and world sizes, or named."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.data.audit import audit_ledger, check_order, history_of, read_history
from framework.data.ledger import (
    Ledger,
    Record,
    append_record,
    ledger_path,
    pack_ids,
    read_ledger,
    segment_record,
    start_record,
    unpack_ids,
)
from framework.data.loader import training_batches
from framework.data.plan import Plan, PlanSource
from framework.data.quarantine import Quarantine, Quarantined
from framework.data.sources import build_plan, open_sources
from framework.errors import DataError
from framework.world import World


@given(st.sets(st.integers(0, 5000)), st.sets(st.integers(0, 2**40), max_size=20))
def test_ids_survive_packing(small: set[int], large: set[int]) -> None:
    ids = np.array(sorted(small | large), np.int64)
    assert np.array_equal(unpack_ids(pack_ids(ids)), ids)


def test_whole_blocks_take_next_to_nothing_and_scattered_ids_few_bits() -> None:
    assert len(pack_ids(np.arange(100_000))) < 300
    rng = np.random.default_rng(0)
    scattered = np.sort(rng.choice(200_000, 100_000, replace=False)).astype(np.int64)
    assert len(pack_ids(scattered)) * 8 < 2.8 * len(scattered)


@dataclass
class Life:
    """One attempt: on how many ranks, how many steps it does, and where in its last save it is killed."""

    ranks: int
    steps: int
    killed: str


KILLED = ("while it trains", "inside the ledger", "before the checkpoint", "after the checkpoint")


@dataclass
class Case:
    plan: Plan
    totals: dict[str, int]
    quarantine: Quarantine
    lives: list[Life]
    every: int
    steps: int
    repeats: int = 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    common = draw(st.sampled_from([1, 2, 4, 6]))
    names = ["one", "two"][: draw(st.integers(1, 2))]
    sources = [
        PlanSource(
            name,
            common * draw(st.integers(1, 3)),
            np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)), np.int64),
            name,
        )
        for name in names
    ]
    totals = {source.name: int(source.shard_sizes.sum()) for source in sources}
    plan = Plan(sources, seed=draw(st.integers(0, 99)), block=draw(st.integers(1, 8)))
    entries = [
        Quarantined(name, draw(st.integers(0, totals[name] - 1)), "k", "s", 0, "r", draw(st.integers(0, 12)))
        for name in names
        if totals[name] > 4
        for _ in range(draw(st.integers(0, 2)))
    ]
    ranks = [number for number in (1, 2, 3, 4, 6) if common % number == 0]
    lives = draw(
        st.lists(
            st.builds(Life, st.sampled_from(ranks), st.integers(0, 12), st.sampled_from(KILLED)), max_size=5
        )
    )
    every, steps, repeats = draw(st.integers(1, 5)), draw(st.integers(1, 15)), draw(st.integers(1, 3))
    lives.append(Life(draw(st.sampled_from(ranks)), steps, "after the checkpoint"))
    return Case(plan, totals, Quarantine(entries), lives, every, steps, repeats)


def used(case: Case, name: str, step: int, epoch: int, index: int) -> int:
    """The sample itself or, while that is out, its substitute."""
    current, attempt = index, 0
    while case.quarantine.holding(name, current, step):
        current, attempt = case.plan.substitute(name, epoch, index, attempt), attempt + 1
    return current


def note_step(case: Case, ledgers: list[Ledger], step: int) -> None:
    for rank, ledger in enumerate(ledgers):
        share = case.plan.share(step, rank=rank, world=len(ledgers), micro=0, accumulation=1)
        for name, ids in share.items():
            fed = [used(case, name, step, int(e), int(i)) for e, i in zip(ids.epoch, ids.index, strict=True)]
            rows = (np.repeat(column, case.repeats) for column in (ids.epoch, ids.index, fed))
            ledger.note(step, name, rank * len(fed) * case.repeats, *rows, case.repeats)


def live(case: Case, run: Path, life: Life, start: int, attempt: int) -> int:
    """One attempt from `start`; returns the step of the last checkpoint that it committed, or `start`."""
    facts = {name: {"count": case.plan.counts[name], "total": case.totals[name]} for name in case.totals}
    append_record(run, start_record(start, attempt, life.ranks, case.plan.hash, facts))
    ledgers = [Ledger(start) for _ in range(life.ranks)]
    committed, stop = start, min(case.steps, start + life.steps)
    for step in range(start, stop):
        note_step(case, ledgers, step)
        done = step + 1
        if done % case.every and done != case.steps:
            continue
        last = done == stop
        if last and life.killed == "while it trains":
            break
        append_record(run, segment_record([ledger.take(done) for ledger in ledgers]))
        if last and life.killed == "inside the ledger":
            size = ledger_path(run).stat().st_size
            os.truncate(ledger_path(run), size - 7)
            break
        if last and life.killed == "before the checkpoint":
            break
        committed = done
    return committed


def content(records: Iterator[Record] | list[Record]) -> dict[str, Any]:
    """All samples of all epochs, all sums of all steps and all substitutions of what counts."""
    history = history_of(records)
    found: dict[str, Any] = {}
    for segment in sorted(history.segments, key=lambda one: one.header["first"]):
        for name, part in segment.header["sources"].items():
            found[f"{name} sums"] = found.get(f"{name} sums", b"") + segment.columns[f"{name}/sums"]
            found.setdefault(f"{name} replaced", []).extend(part["replaced"])
            for epoch in part["epochs"]:
                ids = unpack_ids(segment.columns[f"{name}/{epoch}"]).tolist()
                found.setdefault(f"{name} {epoch}", []).extend(ids)
    return {key: value if isinstance(value, bytes) else sorted(value) for key, value in found.items()}


@settings(max_examples=60)
@given(cases())
def test_the_union_of_all_attempts_is_the_uninterrupted_run(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, quiet = Path(folder) / "run", Path(folder) / "quiet"
        run.mkdir()
        quiet.mkdir()
        step = 0
        for attempt, life in enumerate(case.lives):
            step = live(case, run, life, step, attempt)
        assert step == case.steps
        live(case, quiet, Life(1, case.steps, "after the checkpoint"), 0, 0)
        history = read_history(run)
        audit = audit_ledger(history)
        assert audit.problems == []
        assert check_order(history, case.plan, case.quarantine) == []
        assert content(read_ledger(run)) == content(read_ledger(quiet))
        assert (audit.steps, audit.attempts) == (case.steps, len(case.lives))
        for name, total in case.totals.items():
            whole = case.steps * case.plan.counts[name] // total
            assert [epoch.epoch for epoch in audit.sources[name] if epoch.complete] == list(range(whole))
            for epoch in audit.sources[name]:
                assert epoch.fed + len(epoch.replaced) == epoch.planned


@pytest.fixture
def quiet_run(tmp_path: Path) -> tuple[Case, Path]:
    """Twelve steps of 4 in epochs of 10, on two ranks, a segment every 2 steps."""
    plan = Plan([PlanSource("one", 4, np.array([4, 6]), "x")], seed=1, block=3)
    case = Case(plan, {"one": 10}, Quarantine(), [], 2, 12)
    live(case, tmp_path, Life(2, 12, "after the checkpoint"), 0, 0)
    return case, tmp_path


def rewritten(run: Path, change: Callable[[list[Record]], None]) -> Path:
    records = list(read_ledger(run))
    change(records)
    ledger_path(run).unlink()
    for record in records:
        append_record(run, record)
    return run


def test_a_sample_that_is_missing_or_doubled_is_named(quiet_run: tuple[Case, Path]) -> None:
    _, run = quiet_run

    def change(records: list[Record]) -> None:
        ids = unpack_ids(records[1].columns["one/0"])
        absent = next(index for index in range(10) if index not in ids)
        ids = np.unique([*ids[1:], absent])  # one is lost, and one is fed that comes again later
        records[1].columns["one/0"] = pack_ids(ids)

    before = unpack_ids(list(read_ledger(run))[1].columns["one/0"])
    audit = audit_ledger(read_history(rewritten(run, change)))
    epoch = audit.sources["one"][0]
    assert epoch.missing == [int(before[0])]
    assert epoch.doubled == [next(index for index in range(10) if index not in before)]
    assert any("1 sample never fed" in problem for problem in audit.problems)
    assert any("1 sample fed more than once" in problem for problem in audit.problems)


def test_steps_that_are_missing_doubled_or_cut_are_named(quiet_run: tuple[Case, Path]) -> None:
    _, run = quiet_run
    records = list(read_ledger(run))
    assert audit_ledger(history_of(records)).problems == []
    missing = audit_ledger(history_of([*records[:2], *records[3:]]))
    assert any("lacks the steps 2 to 3" in problem for problem in missing.problems)
    doubled = audit_ledger(history_of([*records, records[2]]))
    assert any("steps 2 to 3 stand in the ledger twice" in problem for problem in doubled.problems)
    again = Record({**records[0].header, "step": 3})
    cut = audit_ledger(history_of([*records[:3], again, *records[3:]]))
    assert any("went on from step 3, in the middle" in problem for problem in cut.problems)
    late = Record({**records[0].header, "step": 5, "plan": "other"})
    other = audit_ledger(history_of([late]))
    assert any(
        "steps 0 to 4 were trained, but the ledger lacks them" in problem for problem in other.problems
    )


def test_another_order_or_an_unplanned_substitute_is_named(quiet_run: tuple[Case, Path]) -> None:
    case, run = quiet_run
    ledgers = [Ledger(0)]
    for step in range(3):
        ids = case.plan.step(step)["one"]
        index = ids.index[::-1] if step == 1 else ids.index
        fed = index.copy()
        if step == 2:
            fed[0] = (fed[0] + 1) % 10
        ledgers[0].note(step, "one", 0, ids.epoch, index, fed)
    history = history_of([next(read_ledger(run)), segment_record([ledgers[0].take(3)])])
    problems = check_order(history, case.plan, case.quarantine)
    assert len(problems) == 2
    assert "step 2: sample" in problems[0]
    assert problems[1].endswith("in step 1")


def test_damage_is_an_error_and_a_torn_end_is_not(quiet_run: tuple[Case, Path]) -> None:
    _, run = quiet_run
    whole = ledger_path(run).read_bytes()
    records = len(list(read_ledger(run)))
    for cut in (1, 9, 40, len(whole) // 2):
        ledger_path(run).write_bytes(whole[:-cut])
        assert len(list(read_ledger(run))) < records
    append_record(run, start_record(0, 1, 1, "p", {}))
    assert list(read_ledger(run))[-1].header["attempt"] == 1
    for place in (1, 30, len(whole) // 2):
        ledger_path(run).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match="is damaged"):
            list(read_ledger(run))
    for short, is_torn in ((whole[:1], True), (whole[:7], True), (b"junk\n", False)):
        ledger_path(run).write_bytes(short)
        with nullcontext() if is_torn else pytest.raises(DataError, match="record at byte 0 is damaged"):
            assert list(read_ledger(run)) == []
    for place in (1, 6):  # of the magic, and of a length that leads behind the end
        damaged = bytearray(whole)
        damaged[place] ^= 0x7F
        ledger_path(run).write_bytes(damaged)
        with pytest.raises(DataError, match="record at byte 0 is damaged"):
            list(read_ledger(run))
        with pytest.raises(DataError, match="record at byte 0 is damaged"):
            append_record(run, start_record(0, 2, 1, "p", {}))
        assert ledger_path(run).read_bytes() == damaged
    ledger_path(run).unlink()
    with pytest.raises(DataError, match="kept no ledger"):
        list(read_ledger(run))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_real_loaders_feed_adds_up_over_kills_and_world_sizes(
    data: st.DataObject, shards: Path, make_recipe: Callable, flip_byte: Callable
) -> None:
    """Real shards, real workers, real damage; each attempt on other ranks and workers than the one before."""
    from framework.data.manifest import Manifest

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(shards, Path(folder) / "shards"))
        manifest = Manifest.open(copy)
        bad = data.draw(st.integers(0, 13), label="bad image")
        flip_byte(copy, manifest, int(manifest.select("stills", "stills", "image")[bad]))
        steps, position, attempt = 6, 0, 0
        mixture = {"moves": 2, "stills": 4}
        records: list[Record] = []
        found = Quarantine()
        sources = open_sources(make_recipe(copy, mixture=mixture))
        plan = build_plan(make_recipe(copy, mixture=mixture), sources)
        while position < steps:
            ranks = data.draw(st.sampled_from([1, 2]), label="ranks")
            workers = data.draw(st.integers(0, 2), label="workers")
            stop = data.draw(st.integers(position + 1, steps), label="stop")
            recipe = make_recipe(copy, mixture=mixture, data={"workers": workers, "on_corrupt": "substitute"})
            facts = {name: {"count": mixture[name], "total": len(sources[name])} for name in mixture}
            records.append(start_record(position, attempt, ranks, plan.hash, facts))
            ledgers = [Ledger(position) for _ in range(ranks)]
            for rank, ledger in enumerate(ledgers):
                batches = training_batches(
                    recipe, sources, plan, World(rank, ranks), start_step=position, stop_step=stop,
                    quarantine=found,
                )  # fmt: skip
                for batch in batches:
                    for event in batch.events:
                        if not found.holding(event["source"], event["index"], batch.step):
                            facts_of = {
                                key: event[key] for key in ("source", "index", "key", "shard", "offset")
                            }
                            found.add([Quarantined(**facts_of, reason="damaged", from_step=batch.step)])
                    for name, group in batch.groups.items():
                        place = rank * len(group.index)
                        ledger.note(batch.step, name, place, group.epoch, group.planned, group.index)
            if data.draw(st.booleans(), label="commits"):
                records.append(segment_record([ledger.take(stop) for ledger in ledgers]))
                position = stop
            attempt += 1
            if attempt > 6:
                return
        history = history_of(records)
        audit = audit_ledger(history)
        assert audit.problems == []
        assert check_order(history, plan, found) == []
        whole = audit.sources["stills"][0]
        assert whole.complete
        assert whole.replaced == [bad]
        assert whole.fed == 13
