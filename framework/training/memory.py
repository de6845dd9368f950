"""Giving memory back while a model is built and restored, and collecting garbage when it costs nobody."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collected_by_hand", "returned_memory"]

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
WHILE_BUILDING = 1 << 20
AFTERWARDS = 1 << 25  # what glibc's own adjustment ends at


@contextmanager
def returned_memory() -> Iterator[None]:
    """Keep what is freed inside from staying with the process (glibc; elsewhere nothing happens).

    Building a model allocates and frees thousands of tensors of some megabytes. glibc learns to keep such
    blocks in its heap, where the optimizer's much larger tensors find no room: a TubeViT-H on two CPU ranks
    then needs gigabytes more. Inside, blocks of a megabyte are mapped one by one and given back when freed.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(MMAP_THRESHOLD, WHILE_BUILDING)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, AFTERWARDS)
        library.malloc_trim(0)


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Inside, cyclic garbage is collected only where `gc.collect` is called.

    Python's collector would come at any line, at another one on every rank, and in a collective all wait for
    the rank that it stopped. What lives already (modules, the model) is set aside, so a collection is cheap.
    """
    gc.collect()
    gc.freeze()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
