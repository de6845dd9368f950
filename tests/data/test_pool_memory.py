"""Promises of the memory that workers share with their rank: mapped once, bounded, never overwritten."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from pathlib import Path
from types import ModuleType

import numpy
import psutil
import pytest
import torch

from framework.data.pool import in_order, pixel_memory
from framework.errors import DataError

pytestmark = pytest.mark.usefixtures("no_worker_is_left_behind")


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


def test_what_came_back_at_once_is_memory_of_nobody_any_more(helpers: ModuleType) -> None:
    before = helpers.descendants()
    items = in_order(lambda item: pixel_memory((1 << 20,)).fill_(item % 256), 400, 1, 1)
    kept = [next(items) for _ in range(300)]  # more than a rank keeps track of: some are copies
    for _ in range(50):
        kept = [*kept[1:], next(items)]
    assert all(bool((pixels == (50 + place) % 256).all()) for place, pixels in enumerate(kept))
    (worker,) = new_workers(before)
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


def new_workers(before: set[int]) -> list[psutil.Process]:
    """The processes that have come below this one, and have none below them."""
    new = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
    return [one for one in new if not one.children()]


def test_workers_keep_only_mappings_of_memory_that_is_in_circulation(helpers: ModuleType) -> None:
    before = helpers.descendants()
    items = in_order(lambda item: pixel_memory((1 << 16,)).fill_(item % 256), 1200, 2, 1)
    held: list[torch.Tensor] = []
    for item, pixels in enumerate(items):
        held.append(pixels)
        if item % 12 == 11:
            held.clear()  # more comes back at once than is needed: it is destroyed, and made anew later
        if item == 1100:
            break
    workers = new_workers(before)
    assert len(workers) == 2
    for worker in workers:
        lines = Path(f"/proc/{worker.pid}/maps").read_text().splitlines()
        assert sum("/memfd:tubeworks" in line for line in lines) <= 12 + 2 + 3
    items.close()


def test_memory_that_the_maker_drops_is_let_go_of(helpers: ModuleType) -> None:
    def make(item: int) -> torch.Tensor:
        for _ in range(5):
            pixel_memory((1 << 20,)).fill_(99)  # dropped: its address is free for the next
        return pixel_memory((1 << 20,)).fill_(item)

    before = helpers.descendants()
    items = in_order(make, 30, 1, 1)
    for item in range(29):
        assert bool((next(items) == item).all())
    (worker,) = new_workers(before)
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


def test_too_few_descriptors_for_another_worker_are_an_error_with_advice() -> None:
    items = in_order(lambda _: os.getpid(), 1000, 1, 1)
    worker = next(items)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # no number is left, whatever is closed
    try:
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(DataError, match=r"raise the limit \(`ulimit -n`\)"):
            list(items)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_rank_that_keeps_all_items_keeps_no_descriptor_of_each() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    items = in_order(lambda item: pixel_memory((1 << 12,)).fill_(item % 256), 600, 1, 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, before[0]), before[1]))
    try:
        kept = list(items)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(bool((pixels == number % 256).all()) for number, pixels in enumerate(kept))


def test_pixels_that_no_memory_holds_are_an_error_with_advice() -> None:
    with pytest.raises(DataError, match=r"no memory for pixels of 8 x 1000000000000 x 64 x 64 x 3 bytes"):
        pixel_memory((8, 10**12, 64, 64, 3))
