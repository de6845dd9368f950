"""Memory that workers and their rank share: pixels lie in it, and it goes to and fro between them.

It is anonymous, named by a descriptor, needs no room in /dev/shm, and is given back by the kernel when the
last process lets go, however it ends. Memory that is new costs the kernel as much time as a twentieth of a
clip's decoding, so what a rank no longer uses (`Lent`) goes back to any of its workers, which fills it again
(`offer`). Both sides keep it mapped, and know it by its name when its descriptor comes again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

__all__ = ["Lent", "Memory", "after_sending", "memory_of", "offer", "received", "shared_memory"]

_MAX_LENT = 250  # a process may have 1024 descriptors in all, where nobody raised the limit
_NAME_BYTES = 12  # random, so that no two are ever taken for each other
_POPULATE = 23  # madvise's MADV_POPULATE_WRITE, which Linux has since 5.14


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


def memory_of(tensor: torch.Tensor) -> Memory | None:
    """What `shared_memory` has given out and the tensor lies in; None where it lies elsewhere."""
    taken = _taken.get(tensor.untyped_storage().data_ptr())
    return taken[0] if taken else None


def after_sending(sent: Collection[Memory]) -> None:
    """Let go of all that `shared_memory` has given out; what was sent is the receiver's now."""
    _let_go(memory for memory, _ in _taken.values() if memory not in sent)
    for memory in sent:
        memory.close()
    _taken.clear()


def received(memories: Sequence[Memory]) -> list[torch.Tensor]:
    """Tensors of memory that is theirs alone."""
    try:
        return [_mapped(memory) for memory in memories]
    finally:
        for memory in memories:
            memory.close()
