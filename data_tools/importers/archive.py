"""Looking into a tar archive without ever unpacking it: members are read in place, by offset.

Links, devices, absolute names and names that climb out of the archive are refused one by one and reported.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from data_tools.readers import MemberReader, Reader
from framework.errors import DataError

__all__ = [
    "ArchiveMember",
    "last_of_each",
    "list_archive",
    "list_member_archive",
    "open_archive",
    "refusal",
    "split_archive_path",
    "whole_archive",
]


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A member below the wanted folder: its place in it, and how to read it or why that is refused."""

    name: str
    reader: Reader | None
    refused: str = ""


def split_archive_path(path: Path) -> tuple[Path, str] | None:
    """`sets/cifar.tar/cifar/train` -> (`sets/cifar.tar`, `cifar/train`); None if no part of it is a file."""
    for archive in (path, *path.parents):
        if archive.is_file():
            inner = path.relative_to(archive).as_posix()
            return archive, "" if inner == "." else inner
    return None


def list_archive(archive: Path, inner: str) -> Iterator[ArchiveMember]:
    """All files of `archive` below the folder `inner`, in the order of the archive.

    Raises DataError if it is not an uncompressed tar archive, or ends in the middle.
    """
    try:
        whole = MemberReader(str(archive.absolute()), archive.stat().st_mtime_ns, 0, archive.stat().st_size)
    except OSError as error:
        raise DataError(f"{archive}: cannot be read ({error.strerror})") from error
    return list_member_archive(str(archive), whole, inner)


def list_member_archive(name: str, archive: MemberReader, inner: str = "") -> Iterator[ArchiveMember]:
    """All files of an archive that is itself a member of one, below the folder `inner`; as `list_archive`."""
    prefix = f"{inner.strip('/')}/" if inner.strip("/") else ""
    try:
        with archive.open() as file, open_archive(file) as tar:
            for member in whole_archive(tar):
                path = member.name.removeprefix("./")
                if member.isdir() or not path.startswith(prefix):
                    continue
                reason = refusal(member)
                reader = None
                if not reason:
                    offset = archive.offset + member.offset_data
                    reader = MemberReader(archive.archive, archive.modified, offset, member.size)
                yield ArchiveMember(path.removeprefix(prefix), reader, reason)
    except tarfile.TarError as error:
        raise DataError(
            f"{name}: cannot be read as an uncompressed tar archive ({error}); if it is compressed, unpack"
            " it to a plain .tar first, if it was downloaded, check that it is complete"
        ) from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error


def whole_archive(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members of an open archive; tarfile.ReadError at damage, which tarfile takes for its end.

    A member that claims a size which its archive cannot hold is damage: with a negative one, tarfile would
    turn round and go on for ever.
    """
    file = cast(BinaryIO, tar.fileobj)
    here = file.tell()
    size = -(-file.seek(0, os.SEEK_END) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(here)
    while True:
        with _damage():
            member = tar.next()
        if member is None:
            break
        if member.size < 0 or not member.offset_data <= tar.offset <= size:
            raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, which are not there")
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps all the millions
    file.seek(tar.offset)
    if any(file.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"no header can be read at offset {tar.offset}")


def open_archive(file: BinaryIO) -> tarfile.TarFile:
    """An uncompressed archive for `whole_archive`; tarfile.ReadError if it is none."""
    with _damage():
        return tarfile.open(fileobj=file, mode="r:", errorlevel=2)


@contextmanager
def _damage() -> Iterator[None]:
    """What tarfile stumbles over in a header, as its own error for damage."""
    try:
        yield
    except (ValueError, LookupError, OverflowError, MemoryError) as error:
        raise tarfile.ReadError(f"a header that cannot be right ({error!r})") from error


def last_of_each(members: Iterable[ArchiveMember]) -> Iterator[ArchiveMember]:
    """Every name once: of several members the last counts, as when unpacking; the others are refused."""
    last: dict[str, ArchiveMember] = {}
    for member in members:
        if member.name in last:
            yield ArchiveMember(member.name, None, "in the archive more than once; the last one counts")
        last[member.name] = member
    yield from last.values()


def refusal(member: tarfile.TarInfo) -> str:
    """Why a member of an archive is not read; empty for a regular file with a name inside the archive."""
    if member.issym() or member.islnk():
        return f"refused: a link inside an archive (to {member.linkname!r})"
    if not member.isreg() or member.issparse():
        return "refused: not a regular file inside the archive"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "refused: its name leads out of the archive"
    return ""
