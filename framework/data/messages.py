"""Items on their way from a worker to its rank: pickled over a socket, pixels in memory that both have.

Pixels lie in anonymous shared memory whose descriptor travels with the message, so they are not copied, need
no room in /dev/shm, and are given back by the kernel when the last process lets go, however it ends. What
comes over the socket was pickled by our own fork, never by a stranger.

New memory costs the kernel as much time as a tenth of a clip's decoding. So a sender keeps what it has sent,
and fills it again once the receiver says that nothing there uses it any more (`Borrowed`, `take_back`).
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import socket
import struct
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Borrowed", "Closed", "receive", "send", "shared_memory", "take_back"]

_HEAD = struct.Struct("<QI")  # bytes of the pickle, number of descriptors
_MAX_DESCRIPTORS = 250  # Linux passes 253 at once
_SHARED_FROM = 1 << 16  # larger tensors travel in shared memory, too: a socket would block its sender


class Closed(Exception):
    """The other side is gone, or does not finish its message."""


@dataclass(frozen=True)
class _Block:
    """Shared memory of this process."""

    number: int
    descriptor: int
    memory: torch.Tensor

    def close(self) -> None:
        """Give it back, as far as this process is concerned."""
        os.close(self.descriptor)


@dataclass
class _Blocks:
    """The shared memory of a process that sends."""

    taken: dict[int, _Block] = field(default_factory=dict)
    """Taken by `shared_memory` and not sent yet, by address."""
    lent: dict[int, _Block] = field(default_factory=dict)
    """Sent, by number."""
    free: list[_Block] = field(default_factory=list)
    """Came back, the latest last."""
    spare: int = 0
    """How many free ones are kept: twice those of the last message."""
    numbers: Iterable[int] = field(default_factory=itertools.count)


_blocks = _Blocks()


@dataclass
class Borrowed:
    """What a receiver has of a sender's shared memory."""

    _held: list[tuple[int, StorageWeakRef]] = field(default_factory=list)

    def add(self, number: int, memory: torch.Tensor) -> None:
        """A block of the sender has come as this tensor."""
        self._held.append((number, StorageWeakRef(memory.untyped_storage())))

    def released(self) -> list[int]:
        """The blocks that no tensor here uses any more, each said once; for the sender's `take_back`."""
        gone = [number for number, storage in self._held if storage.expired()]
        self._held = [(number, storage) for number, storage in self._held if number not in gone]
        return gone


def shared_memory(size: int) -> torch.Tensor:
    """Uint8 (size,) to fill, which `send` passes on without a copy; OSError where there is no room."""
    block = next((one for one in reversed(_blocks.free) if one.memory.nbytes == max(1, size)), None)
    if block is not None:
        _blocks.free.remove(block)
    else:
        block = _new_block(max(1, size))
    _blocks.taken[block.memory.data_ptr()] = block
    return block.memory[:size]


def take_back(numbers: Iterable[int]) -> None:
    """Blocks that this process has sent, and that nobody uses any more, may be filled again."""
    _blocks.free += [_blocks.lent.pop(number) for number in numbers]
    while len(_blocks.free) > _blocks.spare:
        _blocks.free.pop(0).close()


def _new_block(size: int) -> _Block:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tubeworks", os.MFD_CLOEXEC)
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        # Pages are taken now: later a page too many would be a SIGBUS instead of an error.
        os.posix_fallocate(descriptor, 0, size)
        return _Block(next(iter(_blocks.numbers)), descriptor, _mapped(descriptor, size))
    except BaseException:
        os.close(descriptor)
        raise


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    if sys.platform == "linux":  # keeps no descriptor, as Python's own map does
        return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


class _Pickler(pickle.Pickler):
    """Replaces tensors in shared memory by the number of their descriptor in the message."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.blocks: list[_Block] = []
        self._copies: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor) or obj.requires_grad:
            return None
        storage = obj.untyped_storage()
        if storage.data_ptr() not in _blocks.taken or len(self.blocks) >= _MAX_DESCRIPTORS:
            if obj.nbytes < _SHARED_FROM or len(self.blocks) >= _MAX_DESCRIPTORS:
                return None
            copy = shared_memory(obj.nbytes).view(obj.dtype).view(obj.shape)
            copy.copy_(obj)
            self._copies.append(copy)
            obj, storage = copy, copy.untyped_storage()
        block = _blocks.taken[storage.data_ptr()]
        if block not in self.blocks:
            self.blocks.append(block)
        place = self.blocks.index(block)
        size, stride = storage.nbytes(), obj.stride()
        return place, block.number, size, obj.dtype, obj.storage_offset(), tuple(obj.shape), stride

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.dtype != torch.bfloat16 and not obj.requires_grad:
            return torch.from_numpy, (obj.numpy(),)  # a tenth of the time of torch's own way
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, descriptors: Sequence[int], borrowed: Borrowed) -> None:
        super().__init__(file)
        self._descriptors = descriptors
        self._borrowed = borrowed
        self._memory: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        place, number, size, dtype, offset, shape, stride = pid
        if place not in self._memory:
            self._memory[place] = _mapped(self._descriptors[place], size)
            self._borrowed.add(number, self._memory[place])
        return self._memory[place].view(dtype).as_strided(shape, stride, offset)


def send(connection: socket.socket, item: Any) -> None:
    """Send an item; its shared memory is the receiver's until it comes back by `take_back`.

    Errors:
        Closed: the receiver is gone.
        Exception: what pickling raises; nothing was sent then.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(item)
        data, blocks = file.getbuffer(), pickler.blocks
        try:
            head = _HEAD.pack(len(data), len(blocks))
            socket.send_fds(connection, [head], [block.descriptor for block in blocks])
            connection.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from error
        for block in blocks:
            _blocks.lent[block.number] = _blocks.taken.pop(block.memory.data_ptr())
        _blocks.spare = 2 * len(blocks)
    finally:
        while _blocks.taken:  # somebody may still look at it: it is not filled again
            _blocks.taken.popitem()[1].close()


def receive(connection: socket.socket, borrowed: Borrowed | None = None) -> Any:
    """The next item; `borrowed` takes note of what has come in the sender's memory.

    Errors:
        Closed: the sender is gone, or (where the socket has a timeout) stopped in the middle of a message.
    """
    descriptors: list[int] = []
    try:
        head = b""
        while len(head) < _HEAD.size:
            part, more, _, _ = socket.recv_fds(connection, _HEAD.size - len(head), _MAX_DESCRIPTORS)
            descriptors += more
            if not part:
                raise Closed("end of the connection")
            head += part
        length, _ = _HEAD.unpack(head)
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = connection.recv_into(view)
            if not count:
                raise Closed("end of the connection inside a message")
            view = view[count:]
        return _Unpickler(io.BytesIO(data), descriptors, borrowed or Borrowed()).load()
    except OSError as error:
        raise Closed(str(error)) from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
