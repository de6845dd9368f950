"""A given order of classes: from a text file, or from shards that were made before."""

from __future__ import annotations

from pathlib import Path

from framework.data.manifest import MANIFEST_NAME, Kind, Manifest
from framework.errors import DataError

__all__ = ["read_classes"]


def read_classes(path: Path, name: str, kind: Kind) -> tuple[str, ...]:
    """Class names in the order of their labels.

    `path` is a text file with one class a line, or a folder of shards, whose data set `name` (or only one of
    `kind`) is taken: this is how held-out data get the labels of the training data. Raises DataError.
    """
    if path.is_dir():
        if not (path / MANIFEST_NAME).exists():
            raise DataError(f"{path}: not a folder of shards; --classes takes one, or a text file of classes")
        return Manifest.open(path).find(None, name, kind).classes
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --classes") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 ({error})") from error
    classes = tuple(line for line in lines if line)
    if not classes:
        raise DataError(f"{path}: no classes in it; write one a line")
    if len(set(classes)) != len(classes):
        twice = sorted({name for name in classes if classes.count(name) > 1})
        raise DataError(f"{path}: classes that stand there twice: {', '.join(twice[:10])}")
    return classes
