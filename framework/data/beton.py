"""Images from an FFCV file (`.beton`), in the place of those in the shards.

The file is exported from a data set of images (`tubeworks data export-ffcv`), in the order of the manifest.
Only the way from disk to pixels differs: crops, augmentation and seeds are those of the shards, so a `raw`
file gives the same batches bit for bit, without decoding a JPEG. It is memory-mapped, so it is for one node,
and it has no checksums. The shards must still be there.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from framework.data.image import decode_image
from framework.data.video import Undecodable
from framework.errors import DataError

if TYPE_CHECKING:
    from framework.data.sources import OpenSource

__all__ = ["SIDECAR", "BetonImages", "ffcv_module", "open_beton"]

SIDECAR = ".json"
"""What is added to the name of a `.beton` file for the note that says which samples it holds."""
_RAW = 1  # ffcv.fields.rgb_image.IMAGE_MODES
_Mapped = tuple[NDArray[np.int64], Any, dict[int, int], NDArray[np.uint8]]
"""Places in the manifest, ascending; ffcv's entry for each; sizes in bytes by start; the whole file."""


def ffcv_module(name: str) -> ModuleType:
    """A module of ffcv, which is optional; DataError that says what to install where it does not load."""
    try:
        return importlib.import_module(f"ffcv.{name}")
    except (ImportError, OSError) as error:
        raise DataError(
            f"ffcv cannot be used here ({error}): on Debian install libopencv-dev, libturbojpeg0-dev,"
            " pkg-config and g++, then `pip install 'tubeworks[ffcv]'`"
        ) from error


def open_beton(opened: OpenSource) -> BetonImages | None:
    """The FFCV file that stands in for the shards of a source; None if the recipe names none.

    Errors:
        DataError: no such file, or one of other shards.
    """
    source = opened.source
    path = source.beton if opened.split == "train" else source.validation_beton
    return BetonImages(Path(path), opened) if path is not None else None


class BetonImages:
    """The images of a `.beton` file by their place in the manifest."""

    def __init__(self, path: Path, opened: OpenSource) -> None:
        """Check that the file was made from the same selection of the same shards.

        Errors:
            DataError: no such file, or one of other shards.
        """
        self._path = path
        self._selection = opened.selection
        self._mapped: _Mapped | None = None
        note = path.with_name(path.name + SIDECAR)
        try:
            about = json.loads(note.read_text(encoding="utf-8"))
            told = (about["identity"], about["samples"], about["bytes"])
            fits = told == (opened.identity, len(opened), path.stat().st_size)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: no FFCV file that was exported here ({error}); make it with"
                " `tubeworks data export-ffcv`"
            ) from error
        if not fits:
            raise DataError(
                f"{path}: was exported from other shards than {opened.manifest.folder} now holds, or is cut"
                " short; export it again with `tubeworks data export-ffcv`"
            )

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """RGB pixels (height, width, 3) of the sample at `index` of the manifest.

        Errors:
            Undecodable: the bytes in the file are no image.
            DataError: ffcv is not installed.
        """
        indices, images, sizes, data = self._open()
        entry = images[np.searchsorted(indices, index)]
        start, height, width = int(entry["data_ptr"]), int(entry["height"]), int(entry["width"])
        if int(entry["mode"]) == _RAW:
            raw = data[start : start + height * width * 3]
            if len(raw) != height * width * 3:
                raise Undecodable("the FFCV file ends inside the image")
            return raw.reshape(height, width, 3)
        return decode_image(data[start : start + sizes[start]].tobytes())

    def _open(self) -> _Mapped:
        if self._mapped is None:
            reader = ffcv_module("reader").Reader(str(self._path))
            sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
            # pages are shared until somebody writes to them, which nobody does; torch wants them writable
            data = np.memmap(self._path, np.uint8, mode="c")
            self._mapped = (np.asarray(self._selection), reader.metadata["f0"], sizes, data)
        return self._mapped
