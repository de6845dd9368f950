"""Class folders of images or videos, on disk or inside a tar archive."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.importers.archive import ArchiveMember, last_of_each, list_archive, split_archive_path
from data_tools.importers.classes import read_classes
from data_tools.importers.walk import walk_files
from data_tools.items import Collection, Entry, Failure, kind_of_suffix
from data_tools.readers import FileReader, display
from framework.data.manifest import KINDS, Kind
from framework.errors import DataError

__all__ = ["collect_folder", "default_name"]


def default_name(path: Path) -> str:
    """The name of a data set after its folder or archive, in the characters that a name may have."""
    stem = path.name.removesuffix(".tar") or "data"
    return (
        "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in stem).lstrip("_-") or "data"
    )


def collect_folder(
    path: Path, name: str, *, split: str, kind: Kind | None = None, classes_from: Path | None = None
) -> Collection:
    """Files of the class folders directly below `path` (a folder, an archive, or a folder inside an archive).

    The class of a file is its topmost folder, however deep it lies. `kind` is needed only where both images
    and videos lie there; `classes_from` (see `read_classes`) fixes the order of classes, else alphabetical.
    Raises DataError if there are no class folders, or one that is not among those classes.
    """
    found = sorted(_files(path), key=lambda file: display(file.name))
    kind = kind or _single_kind(path, found)
    classes = read_classes(classes_from, name, kind) if classes_from else None
    entries: list[Entry] = []
    failed: list[Failure] = []
    for file in found:
        reason = file.refused or _objection(file.name, kind)
        if reason or file.reader is None:
            failed.append(Failure(f"{name}/{display(file.name)}", reason))
        else:
            folder, stem = display(file.name).split("/")[0], os.path.splitext(file.name)[0]
            entries.append(Entry(file.name, stem, folder, file.reader))
    present = {entry.class_name for entry in entries if entry.class_name is not None}
    if not present:
        raise DataError(f"{path}: no class folders with {kind}s in it; expected {path}/CLASS/FILE")
    if classes is not None and (unknown := sorted(present.difference(classes))):
        raise DataError(f"{path}: folders that are not in the list of classes: {', '.join(unknown[:10])}")
    order = tuple(classes) if classes is not None else tuple(sorted(present | _empty_classes(path)))
    return Collection(name, split, kind, order, entries, [], failed, fixed_classes=classes is not None)


def _files(path: Path) -> Iterator[ArchiveMember]:
    if path.is_dir():
        yield from _walk(path)
        return
    location = split_archive_path(path)
    if location is None:
        raise DataError(f"{path}: no such folder or archive; check the path")
    yield from last_of_each(list_archive(*location))


def _walk(root: Path) -> Iterator[ArchiveMember]:
    for path in walk_files(root):
        relative = os.path.relpath(path, root)
        try:
            yield ArchiveMember(relative, FileReader.of(path))
        except OSError as error:
            yield ArchiveMember(relative, None, f"cannot be read: {error.strerror}")


def _empty_classes(path: Path) -> set[str]:
    """Class folders count even if no file in them is good, so that labels do not depend on damage."""
    if not path.is_dir():
        return set()
    with os.scandir(path) as entries:
        return {display(entry.name) for entry in entries if entry.is_dir() and not entry.name.startswith(".")}


def _single_kind(path: Path, found: Sequence[ArchiveMember]) -> Kind:
    promised = [kind_of_suffix(file.name) for file in found if "/" in file.name]
    counts: dict[Kind, int] = {kind: promised.count(kind) for kind in KINDS if kind in promised}
    if not counts:
        raise DataError(
            f"{path}: no images or videos in class folders here; expected {path}/CLASS/FILE.jpg (or .mp4 …)"
        )
    if len(counts) > 1:
        listing = " and ".join(f"{counts[kind]} {kind}s" for kind in KINDS)
        raise DataError(f"{path}: holds {listing}; one data set is of one kind: say which with --kind")
    return next(iter(counts))


def _objection(name: str, kind: Kind) -> str:
    """Why a file cannot be a sample, as far as its name tells; empty if it can."""
    if "/" not in name:
        return "lies outside the class folders"
    if any(part.startswith(".") for part in name.split("/")):
        return "not media: a hidden file"
    promised = kind_of_suffix(name)
    if promised is None:
        suffix = os.path.splitext(name)[1]
        return f"not media: {suffix!r} is no {kind} suffix" if suffix else "not media: the name has no suffix"
    return "" if promised == kind else f"is a {promised}, and this data set holds {kind}s"
