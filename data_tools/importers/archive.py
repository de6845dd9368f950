"""Looking into a tar archive without ever unpacking it: members are read in place, by offset.

Links, devices, absolute names and names that climb out of the archive are refused one by one and reported.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.readers import MemberReader
from framework.errors import DataError

__all__ = ["ArchiveMember", "list_archive", "split_archive_path"]


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A member below the wanted folder: its place in it, and how to read it or why that is refused."""

    name: str
    reader: MemberReader | None
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
    modified = archive.stat().st_mtime_ns
    prefix = f"{inner.strip('/')}/" if inner.strip("/") else ""
    try:
        with tarfile.open(archive, "r:", errorlevel=2) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isdir() or not name.startswith(prefix):
                    continue
                reason = _refusal(member)
                reader = None
                if not reason:
                    reader = MemberReader(str(archive), modified, member.offset_data, member.size)
                yield ArchiveMember(name.removeprefix(prefix), reader, reason)
                tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps all the millions
    except tarfile.TarError as error:
        raise DataError(
            f"{archive}: cannot be read as an uncompressed tar archive ({error}); if it is compressed, unpack"
            " it to a plain .tar first, if it was downloaded, check that it is complete"
        ) from error
    except OSError as error:
        raise DataError(f"{archive}: cannot be read ({error.strerror})") from error


def _refusal(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"refused: a link inside an archive (to {member.linkname!r})"
    if not member.isreg() or member.issparse():
        return "refused: not a regular file inside the archive"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "refused: its name leads out of the archive"
    return ""
