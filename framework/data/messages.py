"""Items on their way from a worker to its rank: pickled over a socket, pixels in memory that both have.

The descriptors of that memory (`framework.data.shared_memory`) travel with the message, so pixels are not
copied. What comes over the socket was pickled by our own fork, never by a stranger.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

import torch

from framework.data.shared_memory import Lent, Memory, after_sending, memory_of, received, shared_memory
from framework.errors import DataError

__all__ = ["CLOSE_ON_EXEC", "MORE_DESCRIPTORS", "Closed", "receive", "send"]

_HEAD = struct.Struct("<QII")  # bytes of the pickle, memories that tensors of the item lie in, and others
_ENTRY = struct.Struct("<Q12s")  # size and name of a memory; these follow the head, in the descriptors' order
_MAX_DESCRIPTORS = 250  # Linux passes 253 at once
_SHARED_FROM = 1 << 16  # larger tensors travel in shared memory, too: a socket would block its sender

CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
"""Programs that a rank starts inherit no descriptor that was received with this flag."""
MORE_DESCRIPTORS = (
    "data workers pass on their pixels by file descriptors: raise the limit (`ulimit -n`), or lower "
    "data.workers or data.prefetch"
)
"""What helps where there are too few descriptors."""


class Closed(Exception):
    """The other side is gone, or does not finish its message."""


class _Pickler(pickle.Pickler):
    """Replaces shared memory, and tensors in it, by the number that it has in the message."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.filled: list[Memory] = []
        """Memories that tensors lie in."""
        self.others: list[Memory] = []
        self._copies: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        """How the unpickler finds an object that does not lie in the pickle; None for one that does."""
        if isinstance(obj, Memory):
            return (_place(self.others, obj),)
        if not isinstance(obj, torch.Tensor) or obj.requires_grad:
            return None
        if len(self.filled) + len(self.others) >= _MAX_DESCRIPTORS:
            return None
        memory = memory_of(obj)
        if memory is None:
            if obj.nbytes < _SHARED_FROM:
                return None
            copy = shared_memory(obj.nbytes).view(obj.dtype).view(obj.shape)
            copy.copy_(obj)
            self._copies.append(copy)
            obj, memory = copy, memory_of(copy)
            assert memory is not None
        place = _place(self.filled, memory)
        return place, obj.dtype, obj.storage_offset(), tuple(obj.shape), obj.stride()

    def reducer_override(self, obj: Any) -> Any:
        """How tensors of the pickle itself travel."""
        if isinstance(obj, torch.Tensor) and obj.dtype != torch.bfloat16 and not obj.requires_grad:
            return torch.from_numpy, (obj.numpy(),)  # a tenth of the time of torch's own way
        return NotImplemented


def _place(memories: list[Memory], memory: Memory) -> int:
    if memory not in memories:
        memories.append(memory)
    return memories.index(memory)


class _Unpickler(pickle.Unpickler):
    """Puts back what `_Pickler` has replaced."""

    def __init__(self, data: bytearray, filled: Sequence[torch.Tensor], others: Sequence[Memory]) -> None:
        super().__init__(io.BytesIO(data))
        self._filled = filled
        self._others = others

    def persistent_load(self, pid: Any) -> Any:
        """The object that `_Pickler.persistent_id` described."""
        place, *layout = pid
        if not layout:
            return self._others[place]
        dtype, offset, shape, stride = layout
        return self._filled[place].view(dtype).as_strided(shape, stride, offset)


def send(connection: socket.socket, item: Any) -> None:
    """Send an item; what `shared_memory` has given out for it is the receiver's from then on.

    Errors:
        Closed: the receiver is gone.
        DataError: more descriptors are under way than the system allows.
        Exception: what pickling raises; nothing was sent then.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(item)
        data, memories = file.getbuffer(), [*pickler.filled, *pickler.others]
        head = _HEAD.pack(len(data), len(pickler.filled), len(pickler.others))
        head += b"".join(_ENTRY.pack(memory.size, memory.name) for memory in memories)
        try:
            socket.send_fds(connection, [head], [memory.descriptor for memory in memories])
            connection.sendall(data)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:  # all processes of the user count, against this one's limit
                raise DataError(f"{error.strerror}: {MORE_DESCRIPTORS}") from error
            raise Closed(str(error)) from error
    finally:
        after_sending(pickler.filled)


def receive(connection: socket.socket, lent: Lent | None = None) -> Any:
    """The next item; `lent` takes note of the memory that it came in.

    Errors:
        Closed: the sender is gone, or (where the socket has a timeout) stopped in the middle of a message.
        DataError: this process has too few descriptors, or too little address space, for its memory.
    """
    descriptors: list[int] = []
    try:
        length, filled, others = _HEAD.unpack(_head(connection, descriptors))
        entries = _ENTRY.iter_unpack(_exactly(connection, (filled + others) * _ENTRY.size))
        data = _exactly(connection, length)
        if len(descriptors) != filled + others:  # the system leaves out those that there is no room for
            raise DataError(f"{os.strerror(errno.EMFILE)}: {MORE_DESCRIPTORS}")
    except BaseException as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise Closed(str(error)) from error
        raise
    memories = [
        Memory(size, name, descriptor) for (size, name), descriptor in zip(entries, descriptors, strict=True)
    ]
    try:
        tensors = received(memories[:filled]) if lent is None else lent.came(memories[:filled])
    except RuntimeError as error:  # torch's, where it cannot map a file
        raise DataError(f"{str(error).splitlines()[0]}: {MORE_DESCRIPTORS}") from error
    return _Unpickler(data, tensors, memories[filled:]).load()


def _head(connection: socket.socket, descriptors: list[int]) -> bytes:
    """The head of a message; all its descriptors come with it, and are added to the list."""
    head = b""
    while len(head) < _HEAD.size:
        part, more, _, _ = socket.recv_fds(
            connection, _HEAD.size - len(head), _MAX_DESCRIPTORS, CLOSE_ON_EXEC
        )
        descriptors += more
        if not part:
            raise Closed("end of the connection")
        head += part
    return head


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise Closed("end of the connection inside a message")
        view = view[received:]
    return data
