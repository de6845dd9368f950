"""Batches on their way to the device: pinned and copied while the step before still computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from framework.data.loader import Batch, Group

__all__ = ["Closable", "ahead", "copied", "on_device"]

Item = TypeVar("Item")
Made = TypeVar("Made")
Given = TypeVar("Given", covariant=True)


class Closable(Protocol[Given]):
    """An iterator that ends what works for it when it is closed, such as a generator."""

    def __iter__(self) -> Iterator[Given]: ...
    def __next__(self) -> Given: ...
    def close(self) -> None: ...


def on_device(batches: Closable[Batch], device: torch.device) -> Closable[Batch]:
    """The same micro-batches in the same order, with pixels and labels on the device.

    On a GPU a thread pins each one (uint8, as it was decoded) and copies it on a stream of its own, one
    micro-batch ahead, so that the copy runs beside the kernels of the step before. Seeds stay with the host,
    which draws from them. Elsewhere a batch passes as it is. What the loader raises is raised here, at the
    same place in the order. Closing this closes the loader.
    """
    return _copied(batches, device) if device.type == "cuda" else batches


def ahead(items: Closable[Item], work: Callable[[Item], Made]) -> Generator[Made, None, None]:
    """Yield work(item) of every item in order, done by a thread that is at most one item ahead.

    What `items` or `work` raises is raised here when its turn comes. Closing this ends the thread and
    closes `items`.
    """
    with closing(_Ahead(items, work)) as made:
        yield from made


def copied(batch: Batch, device: torch.device) -> Batch:
    """A micro-batch on the device, copied by the current stream; without a GPU the batch itself."""
    if device.type != "cuda":
        return batch
    return replace(batch, groups={name: _copy_group(group, device) for name, group in batch.groups.items()})


def _copied(batches: Closable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        # A thread starts at GPU 0, and going back there would take half a gigabyte of it for every rank.
        torch.cuda.set_device(device)
        with torch.cuda.stream(stream):
            there = copied(batch, device)
            done = torch.cuda.Event()
            done.record(stream)
        return there, done

    with closing(ahead(batches, copy)) as copies:
        for batch, done in copies:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for group in batch.groups.values():
                # Their memory may be used again when this stream, too, is done with it.
                group.pixels.record_stream(current)
                group.labels.record_stream(current)
            yield batch


def _copy_group(group: Group, device: torch.device) -> Group:
    def copy(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    return replace(
        group, pixels=copy(group.pixels), labels=copy(group.labels), seeds=group.seeds.pin_memory()
    )


@dataclass(frozen=True)
class _End:
    """There is nothing more, or an error instead of the next item."""

    error: BaseException | None = None


class _Ahead(Iterator[Made], Generic[Item, Made]):
    """A thread that works, and the queue between it and who asks."""

    def __init__(self, items: Closable[Item], work: Callable[[Item], Made]) -> None:
        self._items = items
        self._made: queue.Queue[Made | _End] = queue.Queue(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name="ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Made:
        made = self._made.get()
        if not isinstance(made, _End):
            return made
        self._made.put(made)  # whoever asks again gets the same answer
        raise made.error or StopIteration

    def close(self) -> None:
        """End the thread, then `items`: a generator cannot be closed while it runs."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._made.get(timeout=0.05)  # room for what the thread wants to hand over
            except queue.Empty:
                continue
        self._items.close()

    def _run(self, work: Callable[[Item], Made]) -> None:
        try:
            for item in self._items:
                if self._closed.is_set():
                    return
                self._made.put(work(item))
            self._made.put(_End())
        except BaseException as error:  # noqa: BLE001 - it is raised where the item is asked for
            self._made.put(_End(error))
