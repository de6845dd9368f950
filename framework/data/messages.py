"""Items on their way from a worker to its rank: pickled over a socket, pixels in memory that both have.

Pixels lie in anonymous shared memory whose descriptor travels with the message, so they are not copied, need
no room in /dev/shm, and are given back by the kernel when the last process lets go, however it ends. What
comes over the socket was pickled by our own fork, never by a stranger.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Closed", "receive", "send", "shared_memory"]

_HEAD = struct.Struct("<QI")  # bytes of the pickle, number of descriptors
_MAX_DESCRIPTORS = 250  # Linux passes 253 at once
_SHARED_FROM = 1 << 16  # larger tensors travel in shared memory, too: a socket would block its sender

_descriptors: dict[int, int] = {}
"""Descriptors of this process's shared memory that was not sent yet, by address."""


class Closed(Exception):
    """The other side is gone, or does not finish its message."""


def shared_memory(size: int) -> torch.Tensor:
    """Zeroed uint8 (size,) that `send` passes on without a copy; OSError where there is no room."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tubeworks", os.MFD_CLOEXEC)
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        # Pages are taken now: later a page too many would be a SIGBUS instead of an error.
        os.posix_fallocate(descriptor, 0, max(1, size))
        tensor = _mapped(descriptor, max(1, size))
    except BaseException:
        os.close(descriptor)
        raise
    _descriptors[tensor.data_ptr()] = descriptor
    return tensor[:size]


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    if sys.platform == "linux":  # keeps no descriptor, as Python's own map does
        return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


class _Pickler(pickle.Pickler):
    """Replaces tensors in shared memory by the number of their descriptor in the message."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.descriptors: list[int] = []
        self._copies: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor) or obj.requires_grad:
            return None
        storage = obj.untyped_storage()
        if storage.data_ptr() not in _descriptors or len(self.descriptors) >= _MAX_DESCRIPTORS:
            if obj.nbytes < _SHARED_FROM or len(self.descriptors) >= _MAX_DESCRIPTORS:
                return None
            copy = shared_memory(obj.nbytes).view(obj.dtype).view(obj.shape)
            copy.copy_(obj)
            self._copies.append(copy)
            obj, storage = copy, copy.untyped_storage()
        descriptor = _descriptors[storage.data_ptr()]
        if descriptor not in self.descriptors:
            self.descriptors.append(descriptor)
        place = self.descriptors.index(descriptor)
        return place, storage.nbytes(), obj.dtype, obj.storage_offset(), tuple(obj.shape), obj.stride()

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.dtype != torch.bfloat16 and not obj.requires_grad:
            return torch.from_numpy, (obj.numpy(),)  # a tenth of the time of torch's own way
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, descriptors: Sequence[int]) -> None:
        super().__init__(file)
        self._descriptors = descriptors
        self._memory: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        place, size, dtype, offset, shape, stride = pid
        if place not in self._memory:
            self._memory[place] = _mapped(self._descriptors[place], size)
        return self._memory[place].view(dtype).as_strided(shape, stride, offset)


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
        data = file.getbuffer()
        try:
            socket.send_fds(
                connection, [_HEAD.pack(len(data), len(pickler.descriptors))], pickler.descriptors
            )
            connection.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from error
    finally:
        while _descriptors:
            os.close(_descriptors.popitem()[1])


def receive(connection: socket.socket) -> Any:
    """The next item.

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
        return _Unpickler(io.BytesIO(data), descriptors).load()
    except OSError as error:
        raise Closed(str(error)) from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
