"""Promises of the worker pool: order, clear errors, no hang, no worker left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy
import psutil
import pytest
import torch

from framework.data import progress
from framework.data.pool import Care, Failure, Lost, in_order, pixel_memory
from framework.errors import CorruptSample, DataError


@pytest.fixture(autouse=True)
def no_worker_is_left_behind(helpers: ModuleType) -> Iterator[None]:
    before = helpers.descendants()
    yield
    gc.collect()
    assert helpers.descendants() <= before


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


def test_tensors_travel_whole_whatever_memory_they_lie_in() -> None:
    def make(item: int) -> dict[str, torch.Tensor]:
        pixels = pixel_memory((3, 4, 5))
        pixels.view(-1).copy_(torch.arange(60) + item)
        return {
            "shared": pixels.permute(2, 0, 1),
            "large": torch.arange(100_000, dtype=torch.float32).view(100, 1000) + item,
            "small": torch.tensor([[True, False]]),
            "bfloat16": torch.full((3,), item, dtype=torch.bfloat16),
            "nothing": torch.empty(0, 4),
            "scalar": torch.tensor(item),
        }

    here, there = make(2), list(in_order(make, 3, 1, 2))[2]
    assert there["shared"].stride() == here["shared"].stride()
    for name, tensor in here.items():
        assert there[name].dtype == tensor.dtype
        assert torch.equal(there[name], tensor), name
    there["shared"] += 1
    there["small"] |= True


def test_memory_is_given_back_and_no_descriptor_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    items = in_order(lambda number: pixel_memory((1 << 20,)) + 1, 40, 2, 2)
    for _ in range(20):
        next(items)
    during = len(os.listdir("/proc/self/fd"))
    assert items.memory() > 1 << 20
    rest = list(items)
    assert len(rest) == 20
    assert during - before <= 12
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_goes_back_to_the_workers_when_nothing_uses_it_and_never_before() -> None:
    def make(item: int) -> torch.Tensor:
        pixels = pixel_memory((1 << 20,))
        pixels.fill_(item % 256)
        return pixels.view(2, -1)

    items = in_order(make, 300, 3, 1)
    seen, kept = set(), []
    for item, pixels in zip(range(200), items, strict=False):
        seen |= shared_memory_here()
        assert bool((pixels == item % 256).all())
        if item % 19 == 0:
            kept.append((item, pixels[1:, :7].permute(1, 0)))  # a view is a use as well
        if item % 19 == 1:
            kept.append((item, pixels.numpy()[:, 5]))
    assert len(seen) <= len(kept) + 3 + 3, "what was let go is filled again"
    assert all((numpy.asarray(view) == item % 256).all() for item, view in kept), (
        "what is in use stays as it is"
    )
    kept.clear()
    del pixels
    for item, made in zip(range(200, 290), items, strict=False):
        assert bool((made == item % 256).all())
    assert len(shared_memory_here()) <= 3 + 3, "what came back at once is let go"
    items.close()
    del made
    assert not shared_memory_here()


def shared_memory_here(process: int | str = "self") -> set[int]:
    """The shared memory that a process has descriptors of, by inode."""
    found = set()
    for entry in os.scandir(f"/proc/{process}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(entry.path).startswith("/memfd:tubeworks"):
                found.add(os.stat(entry.path).st_ino)
    return found


def test_memory_that_comes_again_is_mapped_already() -> None:
    def make(_: int) -> tuple[torch.Tensor, int]:
        pixels = pixel_memory((1000 * 4096,))
        pixels.fill_(1)
        return pixels, resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    faults = [there for _, there in in_order(make, 40, 1, 1)]
    assert faults[9] - faults[0] >= 2 * 1000, "what is new costs a fault a page"
    assert faults[39] - faults[9] < 1000, "30 items of 1000 pages"


def test_memory_lent_to_a_worker_that_is_lost_is_given_up(tmp_path: Path) -> None:
    def make(item: int) -> torch.Tensor:
        pixels = pixel_memory((1 << 20,))
        if item % 10 == 9:
            with contextlib.suppress(FileExistsError):
                (tmp_path / str(item)).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return pixels.fill_(item)

    items, seen = in_order(make, 100, 1, 2), set()
    for number, pixels in enumerate(items):
        assert bool((pixels == number).all())
        seen |= shared_memory_here()
        assert len(shared_memory_here() | mapped_here()) <= 2 + 3
    assert len(seen) > 10, "the memory of 10 workers that were lost came in no more"


def test_what_came_back_at_once_is_memory_of_nobody_any_more() -> None:
    items = in_order(lambda item: pixel_memory((1 << 20,)).fill_(item % 256), 400, 1, 1)
    kept = [next(items) for _ in range(300)]  # more than a rank keeps track of: some are copies
    for _ in range(50):
        kept = [*kept[1:], next(items)]
    assert all(bool((pixels == (50 + place) % 256).all()) for place, pixels in enumerate(kept))
    worker = max(psutil.Process().children(recursive=True), key=lambda child: child.create_time())
    kept.clear()
    for _ in range(20):
        next(items)
    assert len(mapped_here()) <= 4
    assert shared_pages(worker) < 10 << 20
    items.close()


def mapped_here() -> set[int]:
    """The shared memory that this process has mapped, by inode."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "/memfd:tubeworks" in line}


def shared_pages(process: psutil.Process) -> int:
    """Bytes of shared memory that really lie in memory and that a process has mapped."""
    lines = Path(f"/proc/{process.pid}/smaps").read_text().split("/memfd:tubeworks")[1:]
    return sum(int(line.split("Rss:")[1].split()[0]) << 10 for line in lines)


def test_workers_keep_only_mappings_of_memory_that_is_in_circulation() -> None:
    items = in_order(lambda item: pixel_memory((1 << 16,)).fill_(item % 256), 1200, 2, 1)
    held: list[torch.Tensor] = []
    for item, pixels in enumerate(items):
        held.append(pixels)
        if item % 12 == 11:
            held.clear()  # more comes back at once than is needed: it is destroyed, and made anew later
        if item == 1100:
            break
    workers = [one for one in psutil.Process().children(recursive=True) if not one.children()]
    assert len(workers) == 2
    for worker in workers:
        lines = Path(f"/proc/{worker.pid}/maps").read_text().splitlines()
        assert sum("/memfd:tubeworks" in line for line in lines) <= 12 + 2 + 3
    items.close()


def test_memory_that_the_maker_drops_is_let_go_of() -> None:
    def make(item: int) -> torch.Tensor:
        for _ in range(5):
            pixel_memory((1 << 20,)).fill_(99)  # dropped: its address is free for the next
        return pixel_memory((1 << 20,)).fill_(item)

    items = in_order(make, 30, 1, 1)
    for item in range(29):
        assert bool((next(items) == item).all())
    worker = next(one for one in psutil.Process().children(recursive=True) if not one.children())
    assert len(shared_memory_here(worker.pid)) <= 6
    items.close()


@pytest.mark.parametrize("room", [1, 3])
def test_too_few_descriptors_are_an_error_with_advice(room: int) -> None:
    """Without room the system leaves descriptors out; with a little, the memory cannot be mapped."""

    def make(item: int) -> list[torch.Tensor]:
        return [pixel_memory((1 << 12,)).fill_(item) for _ in range(3)]

    items = in_order(make, 10, 1, 1)
    before, used = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd")) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, before[1]))
    try:
        with pytest.raises(DataError, match=r"raise the limit \(`ulimit -n`\)"):
            list(items)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not shared_memory_here()


def test_a_rank_that_keeps_all_items_keeps_no_descriptor_of_each() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    items = in_order(lambda item: pixel_memory((1 << 12,)).fill_(item % 256), 600, 1, 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, before[0]), before[1]))
    try:
        kept = list(items)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(bool((pixels == number % 256).all()) for number, pixels in enumerate(kept))


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
