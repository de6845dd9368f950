"""The thread that works one item ahead: order, errors, endings."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from framework.errors import DataError
from framework.training.transfer import ahead


def count(stop: int, ended: list[str], fail_at: int | None = None) -> Generator[int, None, None]:
    try:
        for number in range(stop):
            if number == fail_at:
                raise DataError(f"no item {number}")
            yield number
    finally:
        ended.append("closed")


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def test_items_come_in_order_and_all_of_them() -> None:
    ended: list[str] = []
    assert list(ahead(count(50, ended), lambda number: number * number)) == [n * n for n in range(50)]
    assert ended == ["closed"]
    assert running() == []


def test_an_error_of_the_loader_comes_in_its_turn() -> None:
    items = ahead(count(5, [], fail_at=3), str)
    assert [next(items) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(DataError, match="no item 3"):
        next(items)
    assert running() == []


def test_an_error_of_the_work_comes_in_its_turn() -> None:
    ended: list[str] = []
    items = ahead(count(5, ended), lambda number: 6 // (2 - number))
    assert [next(items), next(items)] == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert ended == ["closed"]


def test_closing_early_ends_the_thread_and_the_loader() -> None:
    ended: list[str] = []
    items = ahead(count(1_000_000, ended), str)
    assert next(items) == "0"
    items.close()
    assert ended == ["closed"]
    assert running() == []


def test_it_works_at_most_two_items_before_it_is_asked_again() -> None:
    done: list[int] = []
    items = ahead(count(100, []), lambda number: done.append(number) or number)
    assert next(items) == 0
    for thread in running():
        thread.join(timeout=0.3)  # it waits, so this only gives it time to run ahead if it would
    assert len(done) <= 3  # one handed out, one in the queue, one in the thread's hands
    items.close()
