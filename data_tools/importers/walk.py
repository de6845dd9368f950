"""All files below a folder, links followed, loops of links left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from framework.errors import DataError

__all__ = ["walk_files"]


def walk_files(root: Path) -> Iterator[str]:
    """Paths of all files below `root`; DataError for a folder that cannot be listed."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); check the permissions")

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(folder, name)]
        for name in names:
            yield os.path.join(folder, name)


def _leads_back(folder: str, name: str) -> bool:
    """Whether a link points at a folder that it lies in."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    here, target = os.path.realpath(folder), os.path.realpath(path)
    return os.path.commonpath([here, target]) == target
