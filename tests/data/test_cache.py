"""Promises of the cache of shards: whole files or none, one fetch for all, never over its limit."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.data.cache import CacheEntry, ChecksumDiffers, ShardCache
from framework.errors import DataError

FORK = multiprocessing.get_context("fork")


def content(name: str, size: int = 1000) -> bytes:
    return (name.encode() * size)[:size]


def entry_of(name: str, data: bytes | None = None, place: str = "s3://bucket/folder") -> CacheEntry:
    data = content(name) if data is None else data
    return CacheEntry(f"{place}/{name}", len(data), hashlib.blake2b(data, digest_size=16).hexdigest())


def giving(data: bytes, calls: list[int] | None = None) -> Callable[[int], None]:
    def fetch(descriptor: int) -> None:
        if calls is not None:
            calls.append(1)
        os.pwrite(descriptor, data, 0)

    return fetch


def fill(cache: ShardCache, *names: str) -> None:
    for name in names:
        assert cache.get(entry_of(name), giving(content(name))) is not None


def held(cache: ShardCache, *names: str) -> list[str]:
    return [name for name in names if cache.holds(entry_of(name))]


def test_a_shard_is_fetched_once(tmp_path: Path) -> None:
    cache, calls = ShardCache(tmp_path / "made", 10_000), []
    for _ in range(3):
        path = cache.get(entry_of("a"), giving(content("a"), calls))
        assert path is not None
        assert path.read_bytes() == content("a")
    assert calls == [1]


def test_the_same_name_from_elsewhere_or_changed_is_another_shard(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10_000)
    for place, data in (("s3://k400", b"one"), ("s3://in1k", b"two"), ("s3://k400", b"new")):
        entry = entry_of("train-000000.tar", data, place)
        path = cache.get(entry, giving(data))
        assert path is not None
        assert path.read_bytes() == data


def test_wrong_bytes_never_get_the_name(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10_000)
    with pytest.raises(ChecksumDiffers, match="s3://bucket/folder/a: the checksum"):
        cache.get(entry_of("a"), giving(content("b")))
    assert not held(cache, "a")
    assert cache.used() == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota")])
def test_a_full_disk_says_so(error: OSError, tmp_path: Path) -> None:
    def fail(descriptor: int) -> None:
        raise error

    with pytest.raises(DataError, match=r"the disk is full: 0\.0 MiB for s3://bucket/folder/a"):
        ShardCache(tmp_path, 10_000).get(entry_of("a"), fail)


def test_what_the_plan_needs_last_makes_room(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3000)
    fill(cache, "a", "b", "c")
    steps = {"a": 5.0, "b": math.inf, "c": 90.0, "d": 7.0, "e": 50.0}
    cache.next_uses = lambda: {entry_of(name).key: step for name, step in steps.items()}
    assert cache.get(entry_of("d"), giving(content("d")), needed=7.0, wait=False)
    assert held(cache, *"abcd") == ["a", "c", "d"]
    assert cache.get(entry_of("e"), giving(content("e")), needed=50.0, wait=False)
    assert held(cache, *"abcde") == ["a", "d", "e"]
    # nothing that is needed sooner goes for something that is needed later
    assert cache.get(entry_of("c"), giving(content("c")), needed=90.0, wait=False) is None
    assert held(cache, *"abcde") == ["a", "d", "e"]


def test_shards_that_no_plan_knows_go_first_and_the_longest_unused_of_them(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3000)
    fill(cache, "old", "new", "mine")
    os.utime(tmp_path / entry_of("old").key, (1, 1))
    cache.next_uses = lambda: {entry_of("mine").key: math.inf}
    fill(cache, "next")
    assert held(cache, "old", "new", "mine", "next") == ["new", "mine", "next"]


def test_many_at_once_never_grow_it_over_its_limit(tmp_path: Path) -> None:
    """Who makes room must not overlook a shard that gets its name at that moment."""
    names = [f"{number:02d}" for number in range(96)]
    cache = ShardCache(tmp_path, 39_999)
    cache.next_uses = lambda: {entry_of(name).key: float(name) for name in names}

    def fetch_some(seed: int) -> None:
        for name in random.Random(seed).choices(names, k=400):
            fill(cache, name)

    threads = [threading.Thread(target=fetch_some, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        with cache._folder_lock():
            most = max(most, cache.used())
    assert most == 39_000, "full, and no fuller"


def test_a_shard_that_another_run_has_open_stays(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1500)
    fill(cache, "theirs")
    with (tmp_path / entry_of("theirs").key).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(DataError, match=r"the cache is full: .* raise it, or give other runs"):
            fill(cache, "mine")
        assert held(cache, "theirs")
    fill(cache, "mine")
    assert not held(cache, "theirs")


def test_it_never_holds_more_than_its_limit(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3500)
    used = []

    def fetch(descriptor: int) -> None:
        used.append(cache.used())  # room for what comes is taken before it comes

    for number in range(8):
        data = content(str(number))
        cache.get(entry_of(str(number)), lambda d, data=data: (fetch(d), giving(data)(d))[0])
    assert max(used) == 3000


def fetch_slowly(folder: Path, log: Path, seconds: float) -> None:
    def fetch(descriptor: int) -> None:
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(seconds)
        os.pwrite(descriptor, content("a"), 0)

    path = ShardCache(folder, 10_000).get(entry_of("a"), fetch)
    assert path is not None
    assert path.read_bytes() == content("a")


def test_processes_share_one_fetch(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [FORK.Process(target=fetch_slowly, args=(tmp_path / "c", log, 0.3)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "fetched\n"


def test_a_killed_fetcher_holds_up_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    first = FORK.Process(target=fetch_slowly, args=(tmp_path / "c", log, 60.0))
    first.start()
    while not log.read_text():
        time.sleep(0.01)
    second = FORK.Process(target=fetch_slowly, args=(tmp_path / "c", log, 0.0))
    second.start()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    for process in (first, second):
        process.join()
    assert second.exitcode == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".lock", entry_of("a").key]


def test_what_a_killed_fetcher_left_makes_room(tmp_path: Path) -> None:
    (tmp_path / f"{entry_of('dead').key}.part").write_bytes(content("dead", 2000))
    cache = ShardCache(tmp_path, 2500)
    fill(cache, "a", "b")
    assert cache.used() == 2000


def test_who_will_not_wait_is_told_that_another_fetches(tmp_path: Path) -> None:
    cache, began, release = ShardCache(tmp_path, 10_000), threading.Event(), threading.Event()

    def fetch(descriptor: int) -> None:
        began.set()
        release.wait(30)
        os.pwrite(descriptor, content("a"), 0)

    thread = threading.Thread(target=lambda: cache.get(entry_of("a"), fetch))
    thread.start()
    began.wait(30)
    assert cache.get(entry_of("a"), giving(content("a")), wait=False) is None
    release.set()
    thread.join()
    assert held(cache, "a")


def test_an_empty_shard(tmp_path: Path) -> None:
    path = ShardCache(tmp_path, 10).get(entry_of("a", b""), giving(b""))
    assert path is not None
    assert path.stat().st_size == 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be made here .* set data.cache.folder"):
        fill(ShardCache(tmp_path / "file" / "cache", 10_000), "a")
