"""Proof of what a run was fed: exactly once per source and epoch, whatever interrupted it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framework.data.ledger import Record, read_ledger, step_sum, unpack_ids
from framework.data.plan import Plan
from framework.data.quarantine import Quarantine
from framework.wording import counted

__all__ = [
    "Audit",
    "EpochAudit",
    "History",
    "audit_ledger",
    "check_order",
    "history_of",
    "read_history",
    "with_keys",
]

SHOWN = 1000
"""So many missing or doubled samples of an epoch are listed; all are counted."""


@dataclass
class History:
    """What counts of a ledger: the segments that no later attempt has replayed, and how it came about."""

    sources: dict[str, Any] = field(default_factory=dict)
    """{"count", "total"} of each."""
    segments: list[Record] = field(default_factory=list)
    attempts: int = 0
    replayed: int = 0
    """Steps that were fed, thrown away with the weights they had made, and fed again."""
    plans: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps from 0 on that the segments reach to."""
        return max((segment.header["stop"] for segment in self.segments), default=0)


@dataclass
class EpochAudit:
    """One epoch of one source: samples by their index in the source's selection."""

    epoch: int
    planned: int
    """Places of the epoch in the steps so far."""
    complete: bool
    fed: int
    """Different samples that were fed in places of their own."""
    replaced: list[int]
    """Samples whose places went to substitutes."""
    missing: list[int]
    doubled: list[int]
    """Fed more than once in places of their own."""
    missing_count: int = 0
    doubled_count: int = 0


@dataclass
class Audit:
    """The verdict over a run; `problems` is empty if every epoch is exactly once."""

    steps: int
    attempts: int
    replayed: int
    sources: dict[str, list[EpochAudit]]
    totals: dict[str, int]
    problems: list[str]


def read_history(run: Path) -> History:
    """What counts of the ledger of a run.

    Errors:
        DataError: there is no ledger, or it is damaged.
    """
    return history_of(read_ledger(run))


def history_of(records: Iterable[Record]) -> History:
    """What counts of the records of a ledger, in the order of writing."""
    history = History()
    for record in records:
        header = record.header
        if header["kind"] == "start":
            history.attempts += 1
            history.sources = header["sources"]
            if header["plan"] not in history.plans:
                history.plans.append(header["plan"])
            _go_back(history, header["step"])
            if header["step"] > history.steps:
                history.problems.append(
                    f"steps {history.steps} to {header['step'] - 1} were trained, but the ledger lacks them"
                )
        else:
            history.segments.append(record)
    if len(history.plans) > 1:
        history.problems.append(f"the attempts followed different plans: {', '.join(history.plans)}")
    return history


def _go_back(history: History, step: int) -> None:
    """Drop the segments that an attempt which goes on from `step` replays."""
    kept = []
    for segment in history.segments:
        first, stop = segment.header["first"], segment.header["stop"]
        if first >= step:
            history.replayed += stop - first
            continue
        if stop > step:
            history.problems.append(
                f"an attempt went on from step {step}, in the middle of the notes of steps {first} to "
                f"{stop - 1}: which of their samples count cannot be told"
            )
        kept.append(segment)
    history.segments = kept


def audit_ledger(history: History) -> Audit:
    """Exactly-once per source and epoch, from the ledger alone."""
    problems = [*history.problems, *_gaps(history)]
    sources = {}
    for name, facts in history.sources.items():
        sources[name] = list(_epochs(history, name, facts["count"], facts["total"]))
        for epoch in sources[name]:
            problems += _epoch_problems(name, epoch)
    totals = {name: facts["total"] for name, facts in history.sources.items()}
    return Audit(history.steps, history.attempts, history.replayed, sources, totals, problems)


def _gaps(history: History) -> list[str]:
    problems, reached = [], 0
    for segment in sorted(history.segments, key=lambda one: one.header["first"]):
        first, stop = segment.header["first"], segment.header["stop"]
        if first > reached:
            problems.append(f"the ledger lacks the steps {reached} to {first - 1}")
        elif first < reached:
            problems.append(f"steps {first} to {min(stop, reached) - 1} stand in the ledger twice")
        reached = max(reached, stop)
    return problems


class _Seen:
    """The samples of one epoch that were fed in their own places, one bit each."""

    def __init__(self, total: int) -> None:
        self.bits: NDArray[np.uint8] = np.zeros(-(-total // 8), np.uint8)
        self.doubled: list[int] = []
        self.replaced: list[int] = []

    def add(self, ids: NDArray[np.int64], doubled: Iterable[int]) -> None:
        byte, bit = ids >> 3, np.left_shift(1, ids & 7).astype(np.uint8)
        again = (self.bits[byte] & bit) != 0
        self.doubled += [*ids[again].tolist(), *doubled]
        np.bitwise_or.at(self.bits, byte, bit)

    def absent(self, total: int) -> NDArray[np.int64]:
        return np.flatnonzero(np.unpackbits(self.bits, count=total, bitorder="little") == 0)

    def count(self) -> int:
        return int(np.bitwise_count(self.bits).sum())


def _epochs(history: History, name: str, count: int, total: int) -> Iterable[EpochAudit]:
    """The epochs of a source in order; an epoch is let go of as soon as the segments have passed it."""
    open_epochs: dict[int, _Seen] = {}
    steps = history.steps
    for segment in sorted(history.segments, key=lambda one: one.header["first"]):
        part = segment.header["sources"].get(name, {"epochs": {}, "replaced": []})
        for epoch, facts in part["epochs"].items():
            ids = unpack_ids(segment.columns[f"{name}/{epoch}"])
            seen = open_epochs.setdefault(int(epoch), _Seen(total))
            inside = ids[(ids >= 0) & (ids < total)]
            seen.add(inside, [int(index) for index in facts["doubled"]])
        for _, _, epoch, planned, _ in part["replaced"]:
            open_epochs.setdefault(epoch, _Seen(total)).replaced.append(planned)
        done = segment.header["stop"] * count // total
        for epoch in sorted(epoch for epoch in open_epochs if epoch < done):
            yield _epoch(epoch, open_epochs.pop(epoch), steps * count, total)
    for epoch in sorted(open_epochs):
        yield _epoch(epoch, open_epochs[epoch], steps * count, total)


def _epoch(epoch: int, seen: _Seen, places: int, total: int) -> EpochAudit:
    planned = max(0, min(total, places - epoch * total))
    complete = planned == total
    absent = np.setdiff1d(seen.absent(total), seen.replaced) if complete else np.empty(0, np.int64)
    doubled = sorted(set(seen.doubled))
    return EpochAudit(
        epoch,
        planned,
        complete,
        seen.count(),
        sorted(seen.replaced),
        absent[:SHOWN].tolist(),
        doubled[:SHOWN],
        len(absent),
        len(doubled),
    )


def _epoch_problems(name: str, epoch: EpochAudit) -> list[str]:
    problems = []
    where = f"source {name}, epoch {epoch.epoch}"
    if epoch.missing_count:
        problems.append(f"{where}: {counted(epoch.missing_count, 'sample')} never fed")
    if epoch.doubled_count:
        problems.append(f"{where}: {counted(epoch.doubled_count, 'sample')} fed more than once")
    if len(epoch.replaced) != len(set(epoch.replaced)):
        problems.append(f"{where}: a sample was replaced more than once")
    if epoch.fed + len(epoch.replaced) != epoch.planned and not epoch.missing_count:
        problems.append(
            f"{where}: {counted(epoch.fed, 'sample')} and {counted(len(epoch.replaced), 'substitute')} fed "
            f"in {counted(epoch.planned, 'place')}"
        )
    return problems


def check_order(history: History, plan: Plan, quarantine: Quarantine) -> list[str]:
    """Compare every step with the plan: the same samples in the same places, and only the plan's substitutes.

    Needs the shards (for the plan), and takes about a millisecond a step.
    """
    problems = []
    wrong: dict[str, list[int]] = {}
    for segment in history.segments:
        for name in plan.counts:
            part = segment.header["sources"].get(name)
            if part is None:
                continue
            sums = np.frombuffer(segment.columns[f"{name}/sums"], "<u8")
            replaced: dict[int, list[list[int]]] = {}
            for row in part["replaced"]:
                replaced.setdefault(row[0], []).append(row)
                problem = _unplanned(name, row, plan, quarantine)
                problems += [problem] if problem else []
            for step, found in enumerate(sums.tolist(), segment.header["first"]):
                if found != _expected_sum(name, step, plan, replaced.get(step, [])):
                    wrong.setdefault(name, []).append(step)
    for name, steps in wrong.items():
        shown = ", ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")
        problems.append(f"source {name}: not what the plan asks for, or not in its order, in step {shown}")
    return problems


def _expected_sum(name: str, step: int, plan: Plan, replaced: list[list[int]]) -> int:
    ids = plan.of_step(name, step)
    index = ids.index.copy()
    for _, place, _, planned, used in replaced:
        if not (0 <= place < len(index) and index[place] == planned):
            return -1
        index[place] = used
    return step_sum(name, 0, ids.epoch, index)


def _unplanned(name: str, row: list[int], plan: Plan, quarantine: Quarantine) -> str | None:
    """What is wrong with a substitution: [step, place, epoch, planned sample, used sample]."""
    step, _, epoch, planned, used = row
    current, attempt = planned, 0
    while quarantine.holding(name, current, step) is not None and attempt < 10_000:
        current, attempt = plan.substitute(name, epoch, planned, attempt), attempt + 1
    if current == used:
        return None
    return (
        f"source {name}, step {step}: sample {used} was fed instead of {planned}, where plan and quarantine "
        f"ask for {current}"
    )


def with_keys(audit: Audit, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The audit as JSON, with the keys of samples where `keys[source](index)` tells them."""
    sources = {}
    for name, epochs in audit.sources.items():
        tell = keys.get(name)
        sources[name] = {
            "samples": audit.totals[name],
            "epochs": [
                {
                    "epoch": one.epoch,
                    "complete": one.complete,
                    "places": one.planned,
                    "fed": one.fed,
                    "replaced": [_named(index, tell) for index in one.replaced],
                    "missing": [_named(index, tell) for index in one.missing],
                    "missing_count": one.missing_count,
                    "doubled": [_named(index, tell) for index in one.doubled],
                    "doubled_count": one.doubled_count,
                }
                for one in epochs
            ],
        }
    return {
        "steps": audit.steps,
        "attempts": audit.attempts,
        "replayed_steps": audit.replayed,
        "exactly_once": not audit.problems,
        "problems": audit.problems,
        "sources": sources,
    }


def _named(index: int, tell: Any) -> Any:
    return {"index": index, "key": tell(index)} if tell else {"index": index}
