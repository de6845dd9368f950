"""Items on their way from a worker to its rank: pickled over a socket, pixels in memory that both have.

Pixels lie in anonymous shared memory whose descriptor travels with the message, so they are not copied, need
no room in /dev/shm, and are given back by the kernel when the last process lets go, however it ends. What
comes over the socket was pickled by our own fork, never by a stranger.

Memory that is new costs the kernel as much time as a twentieth of a clip's decoding. So what a rank no longer
uses (`Lent`) goes back with the next message to a worker, any worker, which fills it again (`offer`).
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import pickle
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Closed", "Lent", "Memory", "offer", "receive", "send", "shared_memory"]

_HEAD = struct.Struct("<QI")  # bytes of the pickle, number of descriptors
_MAX_DESCRIPTORS = 250  # Linux passes 253 at once
_MAX_LENT = 250  # a process may have 1024 descriptors in all, where nobody raised the limit
_POPULATE = 23  # madvise's MADV_POPULATE_WRITE, which Linux has since 5.14
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # programs that a rank starts inherit no descriptor
_SHARED_FROM = 1 << 16  # larger tensors travel in shared memory, too: a socket would block its sender


class Closed(Exception):
    """The other side is gone, or does not finish its message."""


@dataclass(frozen=True)
class Memory:
    """Shared memory of so many bytes; sent in a message, it is the receiver's alone."""

    size: int
    descriptor: int

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)


_taken: dict[int, Memory] = {}
"""What this process has taken by `shared_memory` and not sent yet, by address."""
_offered: list[Memory] = []
"""What this process may fill again."""


@dataclass
class Lent:
    """The shared memory that has come with items, and whether a tensor of this process still uses it."""

    _used: list[tuple[Memory, StorageWeakRef]] = field(default_factory=list)
    _free: list[Memory] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    """Of the blocks of the last item that had any."""

    def came(self, blocks: Sequence[tuple[Memory, torch.Tensor]]) -> None:
        """An item has come in these blocks; its tensors are views of the given ones."""
        for memory, tensor in blocks:
            if len(self._used) < _MAX_LENT:
                self._used.append((memory, StorageWeakRef(tensor.untyped_storage())))
            else:  # somebody keeps all items: this one's memory is not filled again
                memory.close()
        self._sizes = [memory.size for memory, _ in blocks] or self._sizes

    def returned(self) -> list[Memory]:
        """Memory for one more item like the last, of what nothing here uses any more."""
        used = []
        for memory, storage in self._used:
            if storage.expired():
                self._free.append(memory)
            else:
                used.append((memory, storage))
        self._used = used
        chosen = []
        for size in self._sizes:
            if (memory := next((one for one in self._free if one.size == size), None)) is not None:
                self._free.remove(memory)
                chosen.append(memory)
        while len(self._free) > len(self._sizes):  # what was kept for long has come back at once
            self._free.pop(0).close()
        return chosen

    def close(self) -> None:
        """Let go of all; tensors that use some of it keep it."""
        for memory in (*self._free, *(memory for memory, _ in self._used)):
            memory.close()
        self._free, self._used = [], []


def shared_memory(size: int) -> torch.Tensor:
    """Uint8 (size,) to fill, which `send` passes on without a copy.

    Errors:
        OSError, RuntimeError: there is no room, or no descriptor.
    """
    memory = next((one for one in _offered if one.size == max(1, size)), None)
    if memory is not None:
        _offered.remove(memory)
    else:
        memory = _new_memory(max(1, size))
    try:
        tensor = _mapped(memory)
    except BaseException:
        memory.close()
        raise
    if sys.platform == "linux":  # all pages in one go cost half of what they do one by one
        ctypes.CDLL(None).madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(memory.size), _POPULATE)
    _taken[tensor.data_ptr()] = memory
    return tensor[:size]


def offer(memories: Sequence[Memory]) -> None:
    """Memory that `shared_memory` may give out, instead of what was offered before."""
    while _offered:
        _offered.pop().close()
    _offered.extend(memories)


def _new_memory(size: int) -> Memory:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tubeworks", os.MFD_CLOEXEC)
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        # Pages are taken now: later a page too many would be a SIGBUS instead of an error.
        os.posix_fallocate(descriptor, 0, size)
    except BaseException:
        os.close(descriptor)
        raise
    return Memory(size, descriptor)


def _mapped(memory: Memory) -> torch.Tensor:
    if sys.platform == "linux":  # keeps no descriptor, as Python's own map does
        name = f"/proc/self/fd/{memory.descriptor}"
        return torch.from_file(name, shared=True, size=memory.size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(memory.descriptor, memory.size), dtype=torch.uint8)


class _Pickler(pickle.Pickler):
    """Replaces shared memory, and tensors in it, by the number of its descriptor in the message."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.memories: list[Memory] = []
        self._copies: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        """How the unpickler finds an object that does not lie in the pickle; None for one that does."""
        if isinstance(obj, Memory):
            return self._place(obj), obj.size
        if not isinstance(obj, torch.Tensor) or obj.requires_grad:
            return None
        storage = obj.untyped_storage()
        if storage.data_ptr() not in _taken or len(self.memories) >= _MAX_DESCRIPTORS:
            if obj.nbytes < _SHARED_FROM or len(self.memories) >= _MAX_DESCRIPTORS:
                return None
            copy = shared_memory(obj.nbytes).view(obj.dtype).view(obj.shape)
            copy.copy_(obj)
            self._copies.append(copy)
            obj, storage = copy, copy.untyped_storage()
        place = self._place(_taken[storage.data_ptr()])
        return place, storage.nbytes(), obj.dtype, obj.storage_offset(), tuple(obj.shape), obj.stride()

    def _place(self, memory: Memory) -> int:
        if memory not in self.memories:
            self.memories.append(memory)
        return self.memories.index(memory)

    def reducer_override(self, obj: Any) -> Any:
        """How tensors of the pickle itself travel."""
        if isinstance(obj, torch.Tensor) and obj.dtype != torch.bfloat16 and not obj.requires_grad:
            return torch.from_numpy, (obj.numpy(),)  # a tenth of the time of torch's own way
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Puts back what `_Pickler` has replaced; `blocks` tells what the message came in."""

    def __init__(self, file: io.BytesIO, descriptors: Sequence[int]) -> None:
        super().__init__(file)
        self._descriptors = descriptors
        self.memories: list[Memory] = []
        self._mapped: dict[int, tuple[Memory, torch.Tensor]] = {}

    @property
    def blocks(self) -> list[tuple[Memory, torch.Tensor]]:
        """The shared memory that tensors of the message lie in."""
        return list(self._mapped.values())

    def persistent_load(self, pid: Any) -> Any:
        """The object that `_Pickler.persistent_id` described."""
        place, size, *layout = pid
        memory = Memory(size, self._descriptors[place])
        if not layout:
            self.memories.append(memory)
            return memory
        if place not in self._mapped:
            self._mapped[place] = memory, _mapped(memory)
        dtype, offset, shape, stride = layout
        return self._mapped[place][1].view(dtype).as_strided(shape, stride, offset)


def send(connection: socket.socket, item: Any) -> None:
    """Send an item; its shared memory is the receiver's from then on.

    Errors:
        Closed: the receiver is gone.
        Exception: what pickling raises; nothing was sent then.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(item)
        data, memories = file.getbuffer(), pickler.memories
        try:
            head = _HEAD.pack(len(data), len(memories))
            socket.send_fds(connection, [head], [memory.descriptor for memory in memories])
            connection.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from error
    finally:
        for memory in {*_taken.values(), *pickler.memories}:
            memory.close()
        _taken.clear()


def receive(connection: socket.socket, lent: Lent | None = None) -> Any:
    """The next item; `lent` takes note of the memory that it came in.

    Errors:
        Closed: the sender is gone, or (where the socket has a timeout) stopped in the middle of a message.
    """
    descriptors: list[int] = []
    try:
        head = b""
        while len(head) < _HEAD.size:
            part, more, _, _ = socket.recv_fds(
                connection, _HEAD.size - len(head), _MAX_DESCRIPTORS, _CLOSE_ON_EXEC
            )
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
        unpickler = _Unpickler(io.BytesIO(data), descriptors)
        item = unpickler.load()
        kept = {memory.descriptor for memory in unpickler.memories}
        if lent is not None:
            lent.came(unpickler.blocks)
            kept |= {memory.descriptor for memory, _ in unpickler.blocks}
        descriptors = [one for one in descriptors if one not in kept]
        return item
    except OSError as error:
        raise Closed(str(error)) from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
