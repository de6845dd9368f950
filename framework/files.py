"""Files that survive: written beside their place, synced to the disk, renamed into it, and hashed.

What a run leaves behind goes through `disk`, so that a test can stand another one in its place that is full,
broken, slow or that kills the process, and see whether anything is lost. What goes wrong comes as the
system's own `OSError`; the callers know what to tell the user.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "Disk",
    "append_line",
    "hash_file",
    "replace_file",
    "replace_text",
    "sync_file",
    "sync_folder",
    "write_all",
]

_BLOCK = 1 << 22


class Disk:
    """What is asked of the file system where it matters that nothing is lost."""

    def create(self, path: Path) -> int:
        """Open a new, empty file; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def extend(self, path: Path) -> int:
        """Open a file to write behind its end; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, content: Any) -> int:
        """Write bytes, maybe only some of them; returns how many."""
        return os.write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        """Wait until the disk has what was written."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; a file takes the place of one that has that name."""
        source.replace(target)

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it, if they are not there."""
        path.mkdir(parents=True, exist_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder as far as it can be removed."""
        shutil.rmtree(path, ignore_errors=True)


disk = Disk()
"""Looked up at every call: a test may replace it."""


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system inside are errors of `path`: by a descriptor they name no file, by a temporary
    name one that nobody knows.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the system
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


class _File(io.FileIO):
    """A file for whoever wants a file object; what is written goes through `disk`, and errors name `path`."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor, "wb")
        self._path = path

    def write(self, content: Any, /) -> int:
        with _named(self._path):
            return disk.write(self.fileno(), content)


def hash_file(path: Path) -> str:
    """blake2b (16 bytes, hex) of a whole file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_all(descriptor: int, content: Any) -> None:
    """Write all of some bytes, in as many turns as the system takes."""
    rest = memoryview(content)
    while rest:
        written = disk.write(descriptor, rest)
        if written == 0:
            raise OSError(errno.EIO, "the system takes no more bytes")
        rest = rest[written:]


def append_line(path: Path, line: str) -> None:
    """Add a line (UTF-8) to a file with one write; a part of it, on a disk that fills up, is taken back.

    Half a line that a power cut left at the end is ended first, so that it does not take this one along.
    """
    content = line.encode("utf-8") + b"\n"
    descriptor = disk.extend(path)
    try:
        with _named(path):
            size = os.fstat(descriptor).st_size
            if _is_torn(path, size):
                content = b"\n" + content
            if disk.write(descriptor, content) != len(content):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _is_torn(path: Path, size: int) -> bool:
    """Whether a file of lines does not end with the end of one."""
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) != b"\n"


def replace_file(path: Path, write: Callable[[BinaryIO], Any], *, rivals: bool = False) -> None:
    """Let `write` fill a temporary file beside `path`, make it durable, and only then give it the name.

    After a crash there is the old file or the new one, never a part. With `rivals` the temporary name is this
    process's own: others, on other machines too, may be making the same file.
    """
    own = f".{socket.gethostname()}-{os.getpid()}" if rivals else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    try:
        with _named(path):
            descriptor = disk.create(temporary)
        with io.BufferedWriter(_File(descriptor, path), _BLOCK) as file:
            write(file)
            file.flush()
            with _named(path):
                disk.sync(file.fileno())
        with _named(path):
            disk.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) as `replace_file` does."""
    replace_file(path, lambda file: file.write(text.encode("utf-8")))


def sync_file(path: Path) -> None:
    """Make durable what was written to a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _named(path):
            disk.sync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _named(folder):
            disk.sync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders, and there is nothing else that we could do there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
