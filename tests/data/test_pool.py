"""Promises of the worker pool: order, clear errors, no hang, no worker left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from framework.data.pool import Failure, in_order, pixel_memory
from framework.errors import CorruptSample, DataError


@pytest.fixture(autouse=True)
def no_worker_is_left_behind() -> Iterator[None]:
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


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
    [(signal.SIGKILL, "out of memory"), (signal.SIGBUS, "/dev/shm"), (signal.SIGSEGV, "workers=0")],
)
def test_a_worker_that_dies_is_an_error_that_says_of_what(number: signal.Signals, advice: str) -> None:
    def make(item: int) -> int:
        if item == 3:
            signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
            os.kill(os.getpid(), number)
        return item

    started = time.monotonic()
    with pytest.raises(DataError, match=rf"data worker \d+ was ended by {number.name}: .*{advice}"):
        list(in_order(make, 20, 2, 2))
    assert time.monotonic() - started < 20


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
    items.close()  # type: ignore[attr-defined]
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
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    rank = subprocess.Popen(
        [sys.executable, str(script), end],
        stdout=subprocess.PIPE,
        env={**env, "PYTHONPATH": os.getcwd()},
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


def test_pixels_that_no_memory_holds_are_an_error_with_advice() -> None:
    with pytest.raises(DataError, match=r"no memory for pixels of 8 x 3 x 1000000000000 x 64 x 64 bytes"):
        pixel_memory((8, 3, 10**12, 64, 64))
