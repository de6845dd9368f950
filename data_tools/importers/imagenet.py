"""ImageNet-1k and -21k: folders of synsets, or the original tar archives, read in place.

A folder or archive may hold a folder for each synset (`n01440764/…JPEG`, however deep), an archive for each
(`n01440764.tar`), or flat images (`ILSVRC2012_img_val.tar`). Classes of these come from a list: Kaggle's
`LOC_val_solution.csv`, text with a synset for each image in the order of their names, or the official devkit.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_tools.importers.archive import (
    ArchiveMember,
    last_of_each,
    list_archive,
    list_member_archive,
    split_archive_path,
)
from data_tools.importers.listed import check_classes
from data_tools.importers.walk import walk_files
from data_tools.items import Collection, Entry, Failure, kind_of_suffix
from data_tools.readers import FileReader, MemberReader, display
from framework.errors import DataError

__all__ = ["collect_imagenet", "kaggle_rows"]

_SYNSET = re.compile(r"n\d{8}")


def collect_imagenet(
    path: Path, name: str, *, split: str, labels: Path | None = None, classes: Sequence[str] | None = None
) -> Collection:
    """The images of `path`, whose classes are synsets in alphabetical order, or `classes`.

    That order is the usual one of ImageNet-1k. Images without a class are refused, but in the split `test`.
    Raises DataError if there are no images, and for lists that are none.
    """
    files = sorted(last_of_each(_files(path)), key=lambda file: display(file.name))
    flat = sorted(_stem(file.name) for file in files if _synset(file.name) is None and _is_image(file.name))
    known = _labels(labels, flat) if labels else {}
    entries: list[Entry] = []
    failed: list[Failure] = []
    for file in files:
        synset = _synset(file.name) or known.get(_stem(file.name))
        reason = file.refused or _objection(file.name, synset, split)
        if reason or file.reader is None:
            failed.append(Failure(f"{name}/{display(file.name)}", reason))
        else:
            entries.append(Entry(file.name, _stem(file.name), synset, file.reader))
    present = {entry.class_name for entry in entries if entry.class_name is not None}
    if not entries:
        hint = "; flat images need --labels" if flat and not labels else ""
        raise DataError(
            f"{path}: no images of ImageNet here: a folder or an archive for each synset (n01440764) is"
            f" expected{hint}"
        )
    if classes is not None:
        check_classes(path, present, classes)
    order = tuple(classes) if classes is not None else tuple(sorted(present))
    return Collection(name, split, "image", order, entries, [], failed, fixed_classes=classes is not None)


def _files(path: Path) -> Iterator[ArchiveMember]:
    """All files of a folder or archive, and of the archives directly in it, under `SYNSET/FILE`."""
    if path.is_dir():
        for file in walk_files(path):
            name = os.path.relpath(file, path)
            try:
                reader = FileReader.of(file)
            except OSError as error:
                yield ArchiveMember(name, None, f"cannot be read: {error.strerror}")
                continue
            if name.endswith(".tar"):
                yield from _below(name, list_archive(Path(file), ""))
            else:
                yield ArchiveMember(name, reader)
        return
    location = split_archive_path(path)
    if location is None:
        raise DataError(f"{path}: no such folder or archive; check --input")
    for member in list_archive(*location):
        if isinstance(member.reader, MemberReader) and member.name.endswith(".tar"):
            yield from _below(member.name, list_member_archive(member.name, member.reader))
        else:
            yield member


def _below(archive: str, members: Iterator[ArchiveMember]) -> Iterator[ArchiveMember]:
    """Members of an archive `n01440764.tar` as files of a folder of that name."""
    folder = archive.removesuffix(".tar")
    for member in members:
        yield ArchiveMember(f"{folder}/{member.name}", member.reader, member.refused)


def _synset(name: str) -> str | None:
    """The synset of a file: the folder that it lies in."""
    folder = name.rsplit("/", 2)[-2] if "/" in name else ""
    return folder if _SYNSET.fullmatch(folder) else None


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _is_image(name: str) -> bool:
    return kind_of_suffix(name) == "image"


def _objection(name: str, synset: str | None, split: str) -> str:
    if not _is_image(name):
        return "not media: its name is not that of an image"
    if synset is None and split != "test":
        return "no class: it lies in no folder of a synset, and no list names it"
    return ""


def _labels(path: Path, flat: Sequence[str]) -> Mapping[str, str]:
    """Synset of each flat image, by its name without suffix."""
    try:
        if path.name.endswith((".tar.gz", ".tgz")):
            return _devkit(path, flat)
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{path}: no list of labels can be read from it ({error}); check --labels") from error
    if lines and lines[0].replace(" ", "") == "ImageId,PredictionString":
        return {name: synset for name, synset in kaggle_rows(path) if synset}
    if bad := [line for line in lines if not _SYNSET.fullmatch(line)]:
        raise DataError(
            f"{path}: {bad[0]!r} is no synset such as n01440764; take LOC_val_solution.csv, a text file with"
            " a synset for each image, or ILSVRC2012_devkit_t12.tar.gz"
        )
    return _in_order(path, flat, lines)


def kaggle_rows(path: Path) -> Iterator[tuple[str, str | None]]:
    """Image and synset of each line of Kaggle's lists (`LOC_val_solution.csv`); None where none is named.

    Of several objects in an image the first counts, as in the devkit. Raises DataError with file and line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            next(rows, None)
            for row in rows:
                if len(row) != 2:
                    text = ",".join(row)
                    raise DataError(
                        f"{path}:{rows.line_num}: {text!r} is not `image,synset box …`; download it again"
                    )
                yield row[0], next(iter(row[1].split()), None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}); check the path") from error


def _in_order(path: Path, flat: Sequence[str], synsets: Sequence[str]) -> Mapping[str, str]:
    if len(synsets) != len(flat):
        raise DataError(
            f"{path}: {len(synsets)} labels for {len(flat)} images: the list is in the order of the images'"
            " names, so all of them must be there; LOC_val_solution.csv names each"
        )
    return dict(zip(flat, synsets, strict=True))


def _devkit(path: Path, flat: Sequence[str]) -> Mapping[str, str]:
    """From the official devkit: numbers of classes by image, and synsets by number."""
    from scipy.io import loadmat

    with tarfile.open(path, "r:gz") as archive:
        found = {os.path.basename(member.name): member for member in archive if member.isreg()}
        meta = archive.extractfile(found["meta.mat"])
        truth = archive.extractfile(found["ILSVRC2012_validation_ground_truth.txt"])
        assert meta is not None
        assert truth is not None
        synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        numbers = [int(line) for line in truth.read().split()]
    by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return _in_order(path, flat, [by_number[number] for number in numbers])
