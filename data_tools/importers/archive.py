"""Looking into a tar archive without ever unpacking it: members are read in place, by offset.

Links, devices, absolute names and names that climb out of the archive are refused one by one and reported.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.readers import MemberReader, Reader
from framework.errors import DataError

__all__ = [
    "ArchiveMember",
    "last_of_each",
    "list_archive",
    "list_member_archive",
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
        with archive.open() as file, tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for member in whole_archive(tar):
                path = member.name.removeprefix("./")
                if member.isdir() or not path.startswith(prefix):
                    continue
                reason = _refusal(member)
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
    """All members of an open archive; tarfile.ReadError at damage, which tarfile takes for its end."""
    for member in tar:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps all the millions
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged: no header can be read at offset {tar.offset}")


def last_of_each(members: Iterable[ArchiveMember]) -> Iterator[ArchiveMember]:
    """Every name once: of several members the last counts, as when unpacking; the others are refused."""
    last: dict[str, ArchiveMember] = {}
    for member in members:
        if member.name in last:
            yield ArchiveMember(member.name, None, "in the archive more than once; the last one counts")
        last[member.name] = member
    yield from last.values()


def _refusal(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"refused: a link inside an archive (to {member.linkname!r})"
    if not member.isreg() or member.issparse():
        return "refused: not a regular file inside the archive"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "refused: its name leads out of the archive"
    return ""
