"""A data set of images as an FFCV file, for training, probing and evaluation on one node."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy

from framework.data.beton import SIDECAR, ffcv_module
from framework.data.image import decode_image
from framework.data.manifest import Manifest
from framework.data.shards import ShardReader
from framework.data.sources import OpenSource
from framework.data.video import Undecodable
from framework.errors import DataError
from framework.files import replace_text
from framework.recipe.schema import Source

__all__ = ["ExportOptions", "export_ffcv"]


@dataclass(frozen=True)
class ExportOptions:
    """What is exported where; `raw` keeps pixels, `jpg` encodes them anew: small, with some loss."""

    folder: str
    out: Path
    dataset: str | None = None
    mode: Literal["raw", "jpg"] = "raw"
    quality: int = 92
    workers: int = 1
    overwrite: bool = False


class _Images:
    """The samples of a selection, as ffcv's writer takes them: pixels and label."""

    def __init__(self, opened: OpenSource) -> None:
        self._opened = opened
        self._shards = ShardReader(opened.manifest.folder, opened.name, remote=opened.manifest.remote)

    def __len__(self) -> int:
        return len(self._opened)

    def __getitem__(self, place: int) -> tuple[numpy.ndarray, int]:
        info = self._opened.manifest.sample(int(self._opened.selection[place]))
        data = self._shards.read(info)
        data = self._shards.verify(info, data)
        try:
            return numpy.ascontiguousarray(decode_image(data)), info.label
        except Undecodable as error:
            raise self._shards.corrupt(info, f"does not decode: {error}") from error


def export_ffcv(options: ExportOptions) -> dict[str, Any]:
    """Write `out` and beside it the note which samples it holds; what was written, ready for JSON.

    Samples are in the order of the source's selection. Raises DataError if ffcv is not installed, `out` is
    taken, the data set holds no images, or one of them is corrupt.
    """
    writer = ffcv_module("writer")
    fields = ffcv_module("fields")
    out = options.out.absolute()
    if out.exists() and not options.overwrite:
        raise DataError(f"{out}: exists already; choose another --out, or replace it with --overwrite")
    opened = _open(options)
    images = _Images(opened)
    for place in range(len(images)):  # an error inside ffcv's processes would leave it waiting for ever
        images[place]
    partial = out.with_name(out.name + ".tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    image = fields.RGBImageField(write_mode=options.mode, jpeg_quality=options.quality)
    layout = {"image": image, "label": fields.IntField()}
    try:
        sink = writer.DatasetWriter(str(partial), layout, num_workers=options.workers)
        sink.from_indexed_dataset(images, chunksize=32)
        size = partial.stat().st_size
        note = out.with_name(out.name + SIDECAR)
        note.unlink(missing_ok=True)
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); make room, or another --out"
        ) from error
    about = {
        "identity": opened.identity, "dataset": opened.dataset.name, "samples": len(images), "bytes": size,
        "mode": options.mode,
    }  # fmt: skip
    replace_text(note, json.dumps(about, indent=1) + "\n")
    return {"out": str(out), **about}


def _open(options: ExportOptions) -> OpenSource:
    manifest = Manifest.open(options.folder)
    dataset = manifest.find(options.dataset, options.dataset or "", "image")
    selection = manifest.select(dataset.name, dataset.name, "image")
    known = {"path": str(options.folder), "kind": "image", "classes": max(1, len(dataset.classes))}
    return OpenSource(dataset.name, Source.model_validate(known), manifest, dataset, selection)
