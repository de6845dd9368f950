"""Items on their way from a worker to its rank: pickled over a socket, pixels in memory that both have.

Pixels lie in anonymous shared memory whose descriptor travels with the message, so they are not copied, need
no room in /dev/shm, and are given back by the kernel when the last process lets go, however it ends. What
comes over the socket was pickled by our own fork, never by a stranger.

Memory that is new costs the kernel as much time as a twentieth of a clip's decoding. So what a rank no longer
uses (`Lent`) goes back with the next message to a worker, any worker, which fills it again (`offer`). Both
sides keep it mapped, and know it by its name when its descriptor comes again.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import pickle
import socket
import struct
import sys
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from framework.errors import DataError

__all__ = [
    "CLOSE_ON_EXEC",
    "MORE_DESCRIPTORS",
    "Closed",
    "Lent",
    "Memory",
    "offer",
    "receive",
    "send",
    "shared_memory",
]

_HEAD = struct.Struct("<QII")  # bytes of the pickle, memories that tensors of the item lie in, and others
_ENTRY = struct.Struct("<Q12s")  # size and name of a memory; these follow the head, in the descriptors' order
_MAX_DESCRIPTORS = 250  # Linux passes 253 at once
_MAX_LENT = 250  # a process may have 1024 descriptors in all, where nobody raised the limit
_NAME_BYTES = 12  # random, so that no two are ever taken for each other
_POPULATE = 23  # madvise's MADV_POPULATE_WRITE, which Linux has since 5.14
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


@dataclass(frozen=True)
class Memory:
    """Shared memory of so many bytes, by a descriptor of this process and a name that all know it by."""

    size: int
    name: bytes
    descriptor: int

    def close(self) -> None:
        """Let go of the descriptor; who has it mapped, or another descriptor of it, keeps it."""
        os.close(self.descriptor)

    def destroy(self) -> None:
        """Give its pages back to the system, whoever has it mapped: a look at it is a SIGBUS from now on."""
        os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


_mappings: OrderedDict[bytes, torch.Tensor] = OrderedDict()
"""What this process, a worker, has mapped to fill it, by name; what was used last is last."""
_taken: dict[int, tuple[Memory, torch.Tensor]] = {}
"""What this process has taken by `shared_memory` and not sent yet, by address; the tensor keeps it so."""
_offered: list[Memory] = []
"""What this process may fill again."""


@dataclass
class _Block:
    """Shared memory that has come with an item. It is in use as long as somebody holds `view`."""

    memory: Memory
    mapped: torch.Tensor
    view: weakref.ref[np.ndarray] | None = None
    away: bool = False
    """Whether a worker has it, to fill it again."""

    @property
    def free(self) -> bool:
        return not self.away and (self.view is None or self.view() is None)


@dataclass
class Lent:
    """The shared memory that has come with items: a rank's, which lends it to its workers."""

    _blocks: dict[bytes, _Block] = field(default_factory=dict)
    _last: list[int] = field(default_factory=list)
    """Sizes of the blocks of the last item that had any."""

    def came(self, memories: Sequence[Memory]) -> list[torch.Tensor]:
        """An item has come in this memory: uint8 tensors of it, which are watched, and all their views."""
        self._last = [memory.size for memory in memories] or self._last
        tensors: list[torch.Tensor] = []
        try:
            for memory in memories:
                tensors.append(self._came(memory))
        finally:
            for memory in memories[len(tensors) :]:
                memory.close()
        return tensors

    def _came(self, memory: Memory) -> torch.Tensor:
        block = self._blocks.get(memory.name)
        if block is not None:
            memory.close()
        elif len(self._blocks) < _MAX_LENT:
            block = self._blocks[memory.name] = _Block(memory, _mapped(memory))
        else:  # somebody keeps all items: from now on copies of them
            copy = _mapped(memory).clone()
            memory.destroy()
            return copy
        block.away = False
        view = block.mapped.numpy()[:]
        block.view = weakref.ref(view)
        return torch.from_numpy(view)  # whose memory holds `view` as long as any tensor uses it

    def __len__(self) -> int:
        """How many there are, those that workers have included."""
        return len(self._blocks)

    def lend(self) -> list[Memory]:
        """Memory for one more item like the last, of what nothing here uses any more."""
        free = [block for block in self._blocks.values() if block.free]
        chosen = []
        for size in self._last:
            if (block := next((one for one in free if one.memory.size == size), None)) is not None:
                free.remove(block)
                block.away = True
                chosen.append(block.memory)
        surplus = max(0, len(free) - len(self._last))  # what was kept for long has come back at once
        self._forget(block.memory for block in free[:surplus])
        return chosen

    def settle(self, memories: Iterable[Memory]) -> None:
        """A worker has used lent memory for what has come from it by now, or is gone: forget the rest."""
        self._forget([memory for memory in memories if self._blocks[memory.name].away])

    def _forget(self, memories: Iterable[Memory]) -> None:
        for memory in memories:
            del self._blocks[memory.name]
            memory.destroy()

    def close(self) -> None:
        """Let go of all, when no worker lives any more; tensors that use some of it keep it.

        What nothing uses is destroyed: the workers of another pool, forked meanwhile, have it mapped as well.
        """
        for block in self._blocks.values():
            if block.away or block.free:
                block.memory.destroy()
            else:
                block.memory.close()
        self._blocks.clear()


def shared_memory(size: int) -> torch.Tensor:
    """Uint8 (size,) to fill, which `send` passes on without a copy; afterwards it is not to be looked at.

    Errors:
        OSError, RuntimeError: there is no room, or no descriptor.
    """
    memory = next((one for one in _offered if one.size == max(1, size)), None)
    if memory is None:
        memory, again = _new_memory(max(1, size)), False
    else:
        _offered.remove(memory)
        again = True
    try:
        tensor = _mappings.get(memory.name)
        if tensor is None:
            tensor = _mapped(memory)
            _take_pages(tensor)
    except BaseException:
        memory.close()
        raise
    if again:  # then it comes once more
        _mappings[memory.name] = tensor
        _mappings.move_to_end(memory.name)
    _taken[tensor.data_ptr()] = memory, tensor
    return tensor[:size]


def offer(memories: Sequence[Memory], kept: int) -> None:
    """Memory that `shared_memory` may give out, instead of what was offered before.

    Of all that has come again `kept` stay mapped: as many as the rank has; others are no more.
    """
    _let_go(_offered)
    _offered[:] = memories
    while len(_mappings) > kept:
        _mappings.popitem(last=False)


def _let_go(memories: Iterable[Memory]) -> None:
    """Close memory that will not come again, and its mapping."""
    for memory in memories:
        _mappings.pop(memory.name, None)
        memory.close()


def _take_pages(tensor: torch.Tensor) -> None:
    """All in one go, which costs half of what they do one by one."""
    if sys.platform == "linux":
        address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
        ctypes.CDLL(None).madvise(address, size, _POPULATE)


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
    return Memory(size, os.urandom(_NAME_BYTES), descriptor)


def _mapped(memory: Memory) -> torch.Tensor:
    if sys.platform == "linux":  # keeps no descriptor, as Python's own map does
        name = f"/proc/self/fd/{memory.descriptor}"
        return torch.from_file(name, shared=True, size=memory.size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(memory.descriptor, memory.size), dtype=torch.uint8)


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
        storage, full = obj.untyped_storage(), len(self.filled) + len(self.others) >= _MAX_DESCRIPTORS
        if storage.data_ptr() not in _taken or full:
            if obj.nbytes < _SHARED_FROM or full:
                return None
            copy = shared_memory(obj.nbytes).view(obj.dtype).view(obj.shape)
            copy.copy_(obj)
            self._copies.append(copy)
            obj, storage = copy, copy.untyped_storage()
        place = _place(self.filled, _taken[storage.data_ptr()][0])
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
        _let_go(memory for memory, _ in _taken.values() if memory not in pickler.filled)
        for memory in pickler.filled:
            memory.close()
        _taken.clear()


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
        tensors = _received(memories[:filled]) if lent is None else lent.came(memories[:filled])
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


def _received(memories: Sequence[Memory]) -> list[torch.Tensor]:
    """Tensors of memory that is theirs alone."""
    try:
        return [_mapped(memory) for memory in memories]
    finally:
        for memory in memories:
            memory.close()
