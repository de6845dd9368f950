"""Where the bytes of a sample come from. Readers travel to worker processes, and elsewhere as JSON."""

from __future__ import annotations

import errno
import importlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from framework.errors import DataError

__all__ = [
    "FilePart",
    "FileReader",
    "MemberReader",
    "Reader",
    "Unusable",
    "display",
    "reader_from_json",
    "reader_to_json",
]

_READERS = {
    "FileReader": "data_tools.readers",
    "MemberReader": "data_tools.readers",
    "MotionClip": "data_tools.synth",
    "DigitPicture": "data_tools.synth",
}
"""The classes of readers and the modules that they are in: a plan names no others."""


class Unusable(DataError):
    """One file that cannot become a sample; the message says why. It is reported and left out."""


class Reader(Protocol):
    """Where the bytes of an item come from: a frozen dataclass of plain values."""

    @property
    def size(self) -> int:
        """Number of bytes, or an estimate where they are made on the way."""
        ...

    def read(self) -> bytes:
        """All bytes; OSError or Unusable if that is not possible."""
        ...

    def open(self) -> BinaryIO:
        """The bytes as a file that can be searched, for those who need only a part of a long one."""
        ...


@dataclass(frozen=True, slots=True)
class FileReader:
    """A file on disk: absolute path, size in bytes, time of change in ns."""

    path: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: str | Path | os.DirEntry[str]) -> FileReader:
        """The file at `path` as it is now; OSError for what may have no end, such as a pipe or a device."""
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return cls(os.path.abspath(path), status.st_size, status.st_mtime_ns)

    def read(self) -> bytes:
        """The whole file; OSError where it cannot be read."""
        with open(self.path, "rb") as file:
            return file.read()

    def open(self) -> BinaryIO:
        """The file itself."""
        return open(self.path, "rb")


@dataclass(frozen=True, slots=True)
class MemberReader:
    """A regular file inside an uncompressed tar archive, read in place."""

    archive: str
    modified: int
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes; Unusable where the archive ends before them."""
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise Unusable(f"the archive ends inside this file ({len(data)} of {self.size} bytes)")
        return data

    def open(self) -> BinaryIO:
        """The member as a file of its own."""
        return cast(BinaryIO, io.BufferedReader(FilePart(self.archive, self.offset, self.size)))


class FilePart(io.RawIOBase):
    """A stretch of a file as a file of its own; `offset` and `size` in bytes."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As `io.RawIOBase.seek`, within the stretch."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        """The place within the stretch."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase.readinto`; 0 at the end of the stretch."""
        view = memoryview(buffer)[: max(0, min(len(buffer), self._size - self._place))]
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(view)
        self._place += count
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def display(text: str) -> str:
    """`text` as valid Unicode: bytes of a file name that are not UTF-8 become backslash escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def reader_to_json(reader: Reader) -> list[Any]:
    """A reader as plain values: its class and its fields."""
    values = (getattr(reader, field.name) for field in fields(cast(Any, reader)))
    return [
        type(reader).__name__,
        *({"hex": value.hex()} if isinstance(value, bytes) else value for value in values),
    ]


def reader_from_json(values: Sequence[Any]) -> Reader:
    """The reader that `reader_to_json` described; KeyError for one that is not known."""
    name, *rest = values
    kind = getattr(importlib.import_module(_READERS[name]), name)
    return kind(*map(_field, rest))


def _field(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return tuple(value) if isinstance(value, list) else value
