"""Promises of the worker pool: order, clear errors, no hang, no worker left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from framework.data import progress
from framework.data.pool import Care, Failure, Lost, in_order, pixel_memory
from framework.errors import CorruptSample, DataError

pytestmark = pytest.mark.usefixtures("no_worker_is_left_behind")


@pytest.mark.parametrize("workers", [0, 1, 3, 9])
def test_items_come_in_order(workers: int) -> None:
    def make(number: int) -> torch.Tensor:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return torch.full((2,), number)

    assert [int(item[0]) for item in in_order(make, 8, workers, 2)] == list(range(8))
    assert list(in_order(make, 0, workers, 2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_arrives_as_it_was_made(workers: int) -> None:
    error = CorruptSample("gone", source="a", shard="s.tar", key="k", offset=7)
    items = in_order(lambda number: number if number < 3 else Failure(error), 5, workers, 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CorruptSample) as caught:
        next(items)
    assert str(caught.value) == str(error)
    assert caught.value.offset == 7


@pytest.mark.parametrize(
    ("number", "advice"),
    [(signal.SIGKILL, "out of memory"), (signal.SIGBUS, "cut short"), (signal.SIGSEGV, "workers=0")],
)
def test_a_worker_that_dies_is_an_error_that_says_of_what(number: signal.Signals, advice: str) -> None:
    def make(item: int) -> int:
        if item == 3:
            signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
            os.kill(os.getpid(), number)
        return item

    started = time.monotonic()
    with pytest.raises(DataError, match=rf"data worker \d+ was ended by {number.name}.*: .*{advice}"):
        list(in_order(make, 20, 2, 2))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_worker_that_is_lost_once_costs_nothing(number: signal.Signals, tmp_path: Path) -> None:
    def make(item: int) -> tuple[int, torch.Tensor]:
        progress.begin_sample(0, item)
        progress.stage("decode")
        if item == 3 and not (tmp_path / "lost").exists():
            (tmp_path / "lost").touch()
            signal.signal(number, signal.SIG_DFL) if number == signal.SIGSEGV else None
            os.kill(os.getpid(), number)
        pixels = pixel_memory((100,))
        pixels += item
        return item, pixels

    told: list[Lost] = []
    items = list(in_order(make, 12, 2, 2, Care(decode_seconds=1.0, told=told.append)))
    assert [item for item, _ in items] == list(range(12))
    assert all(bool((pixels == item).all()) for item, pixels in items)
    assert (tmp_path / "lost").exists()
    assert told == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sample_that_costs_two_workers_is_told_to_the_maker(number: signal.Signals) -> None:
    bad: dict[int, str] = {}

    def told(value: Lost) -> None:
        bad[value.index] = value.reason

    def make(item: int) -> str:
        for index in (2 * item, 2 * item + 1):
            progress.begin_sample(7, index)
            progress.stage("decode")
            if index in (7, 12, 13) and index not in bad:
                os.kill(os.getpid(), number)
        return " | ".join(bad.get(index, "good") for index in (2 * item, 2 * item + 1))

    items = list(in_order(make, 10, 3, 2, Care(decode_seconds=0.5, told=told)))
    lost = "was ended by SIGKILL" if number == signal.SIGKILL else r"hung for \d s"
    for number_of_item, item in enumerate(items):
        parts = item.split(" | ")
        for index, part in zip((2 * number_of_item, 2 * number_of_item + 1), parts, strict=True):
            if index in (7, 12, 13):
                assert re.search(rf"one {lost} at decode, 2 in all", part), part
            else:
                assert part == "good"


def test_storage_that_hangs_is_no_fault_of_the_sample() -> None:
    told: list[Lost] = []

    def make(item: int) -> int:
        progress.begin_sample(0, item)
        progress.stage("read")
        if item == 2:
            time.sleep(3600)
        return item

    items = in_order(make, 4, 1, 1, Care(read_seconds=0.3, told=told.append))
    with pytest.raises(DataError, match=r"hung for \d s at read of sample 2 of source 0.*data\.read_seconds"):
        list(items)
    assert told == []


def test_what_is_told_reaches_every_worker_before_the_items_asked_for_later() -> None:
    known: list[int] = []
    items = in_order(lambda _: sum(known), 30, 3, 1, Care(told=known.append))
    assert next(items) == 0
    items.tell(5)
    for _ in range(3):
        next(items)
    assert set(items) == {5}


def test_a_defect_in_the_code_keeps_its_class_and_traceback() -> None:
    def make(item: int) -> int:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        list(in_order(make, 3, 1, 2))


def test_signals_to_the_group_leave_workers_alone_and_closing_ends_them_at_once() -> None:
    def make(item: int) -> int:
        time.sleep(0.02 if item < 4 else 30)
        return os.getpid()

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # as in a rank whose signals a thread takes
    try:
        items = in_order(make, 8, 2, 2)
        workers = {next(items), next(items)}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker, number)
    workers.update((next(items), next(items)))
    assert len(workers) == 2
    started = time.monotonic()
    items.close()
    assert time.monotonic() - started < 3


def test_the_handler_for_ended_children_is_left_as_it_was() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    items = in_order(lambda number: number, 4, 2, 2)
    next(items)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_the_random_generator_of_the_rank_is_not_touched() -> None:
    before = torch.get_rng_state()
    assert list(in_order(lambda number: number, 4, 2, 2)) == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)


SCRIPT = """
import os, sys, time
from framework.data.pool import in_order

def make(item):
    if item > 1:
        time.sleep(60)
    return os.getpid()

items = in_order(make, 8, 2, 2)
print(next(items), next(items), flush=True)
if sys.argv[1] == "exit":
    sys.exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_workers_end_with_their_rank(end: str, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    rank = subprocess.Popen(
        [sys.executable, str(script), end],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        text=True,
    )
    assert rank.stdout is not None
    workers = [int(pid) for pid in rank.stdout.readline().split()]
    assert len(workers) == 2
    if end == "kill":
        rank.kill()
    rank.wait(timeout=20)
    rank.stdout.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and _runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its rank"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
