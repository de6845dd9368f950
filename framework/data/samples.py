"""One sample from its shard to pixels: read, verify, decode, crop, resize, augment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from framework.data.augment import random_box, resize, view_boxes
from framework.data.beton import BetonImages, open_beton
from framework.data.clips import random_clip, still_of, uniform_clips
from framework.data.color import color_jitter
from framework.data.image import decode_image
from framework.data.manifest import SampleInfo
from framework.data.progress import STAGES, stage
from framework.data.randaugment import rand_augment
from framework.data.randomness import Draws
from framework.data.shards import ShardReader
from framework.data.sources import OpenSource
from framework.data.video import Box, Undecodable, VideoRequest, decode_video
from framework.errors import CorruptSample
from framework.recipe.schema import Source

__all__ = ["SampleReader", "ViewReader"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class _View:
    """One view of a sample: frame indices in the order of the clip (with repeats), and a box of the frame."""

    frames: Sequence[int]
    box: Box
    mirrored: bool = False


class ViewReader:
    """Turns samples into the views of a source: uint8 arrays (frames, size, size, 3).

    Bytes come from `shards`; with `beton`, pixels come from there in their place.
    """

    def __init__(self, source: Source, shards: ShardReader, beton: BetonImages | None = None) -> None:
        self._source = source
        self._shards = shards
        self._beton = beton
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        """Where the time of the samples went."""

    def corrupt(self, info: SampleInfo, reason: str) -> CorruptSample:
        """The error for a sample that cannot be used."""
        return self._shards.corrupt(info, reason)

    def training_views(self, info: SampleInfo, seeds: Sequence[int], out: Pixels | None = None) -> Pixels:
        """Random views of a sample, one for each seed: clip, crop, flip, RandAugment, colours.

        The sample is read and decoded once for all of them; a view is the same whatever others there are.
        They are written into `out` (views, frames, size, size, 3), by default new memory, which is returned.

        Errors:
            CorruptSample: bytes that are not those of the manifest, or that do not decode.
            DataError: the shard cannot be read.
        """
        views = [self._random_view(info, seed) for seed in seeds]
        made = self._views(info, views, out)
        with self._timed("augment"):
            for view, pixels, seed in zip(views, made, seeds, strict=True):
                if view.mirrored:
                    _mirror(pixels)
                self._augment(pixels, seed)
        return made

    def _random_view(self, info: SampleInfo, seed: int) -> _View:
        source = self._source
        frames = [0]
        if source.clip is not None:
            frames = random_clip(source.clip, info.frames, info.fps, Draws(seed, "clip"))
        elif source.still is not None:
            frames = [still_of(source.still, info.frames, Draws(seed, "clip"))]
        box = random_box(Draws(seed, "crop"), info.height, info.width, source.augment, source.size)
        mirrored = Draws(seed, "flip").chance(source.augment.flip)
        return _View(frames, box, mirrored)

    def _augment(self, pixels: Pixels, seed: int) -> None:
        augment = self._source.augment
        if augment.randaugment is not None:
            pixels[...] = rand_augment(pixels, augment.randaugment, Draws(seed, "randaugment"))
        if augment.color_jitter is not None:
            pixels[...] = color_jitter(pixels, augment.color_jitter, Draws(seed, "color_jitter"))

    def evaluation_views(
        self,
        info: SampleInfo,
        temporal: int,
        spatial: int,
        *,
        shuffle_seed: int | None = None,
        out: Pixels | None = None,
    ) -> Pixels:
        """The fixed views of a sample: (views, frames, size, size, 3), temporal views slowest.

        An image has one view, the middle. `shuffle_seed` (None: off) puts the frames of each clip into a
        random order, the same for all views of the sample.
        `out` and errors are those of `training_views`.
        """
        clip = self._source.clip
        if clip is None:
            boxes = view_boxes(info.height, info.width, 1)
            frame = info.frames // 2 if self._source.still else 0
            return self._views(info, [_View([frame], boxes[0])], out)
        clips = uniform_clips(clip, info.frames, info.fps, temporal)
        if shuffle_seed is not None:
            order = Draws(shuffle_seed, "shuffle").permutation(clip.frames)
            clips = [[frames[place] for place in order] for frames in clips]
        boxes = view_boxes(info.height, info.width, spatial)
        return self._views(info, [_View(frames, box) for frames in clips for box in boxes], out)

    def _views(self, info: SampleInfo, views: Sequence[_View], out: Pixels | None) -> Pixels:
        """Decode every frame once, and cut the views out of it: (views, frames, size, size, 3)."""
        if out is None:
            size = self._source.size
            out = np.empty((len(views), len(views[0].frames), size, size, 3), np.uint8)
        try:
            if self._beton is not None:
                with self._timed("decode"):
                    image = self._beton.pixels(info.index)
                self._cut_image(info, image, views, out)
            elif info.kind == "image":
                self._image_views(info, self._bytes(info), views, out)
            else:
                self._video_views(info, self._bytes(info), views, out)
        except Undecodable as error:
            place = "from the FFCV file: " if self._beton is not None else ""
            raise self._shards.corrupt(info, f"does not decode{place}: {error}") from error
        return out

    def _bytes(self, info: SampleInfo) -> bytes:
        """The bytes of a sample, which are those of the manifest."""
        with self._timed("read"):
            data = self._shards.read(info)
        with self._timed("verify"):
            return self._shards.verify(info, data)

    def _image_views(self, info: SampleInfo, data: bytes, views: Sequence[_View], out: Pixels) -> None:
        with self._timed("decode"):
            image = decode_image(data)
        self._cut_image(info, image, views, out)

    def _cut_image(self, info: SampleInfo, image: Pixels, views: Sequence[_View], out: Pixels) -> None:
        if image.shape[:2] != (info.height, info.width):
            raise Undecodable(
                f"{image.shape[1]}x{image.shape[0]} pixels, the manifest says {info.width}x{info.height}"
            )
        with self._timed("augment"):
            for view, rows in zip(views, out, strict=True):
                resize(_part(image[None], view.box), self._source.size, rows)

    def _video_views(self, info: SampleInfo, data: bytes, views: Sequence[_View], out: Pixels) -> None:
        wanted = sorted({index for view in views for index in view.frames})
        boxes = sorted({view.box for view in views})
        around = _bounding_box(boxes)
        request = VideoRequest(wanted, info.frames, info.height, info.width, info.keyframes.tolist(), around)
        chunks = decode_video(data, request)
        while True:
            with self._timed("decode"):
                found, chunk = next(chunks, (None, None))
            if found is None or chunk is None:
                return
            indices = found.tolist()
            with self._timed("augment"):
                for box in boxes:
                    mine = [(view, rows) for view, rows in zip(views, out, strict=True) if view.box == box]
                    frames = {index for view, _ in mine for index in view.frames}
                    here = [place for place, index in enumerate(indices) if index in frames]
                    if not here:
                        continue
                    part = _part(chunk, box._replace(top=box.top - around.top, left=box.left - around.left))
                    part = part if len(here) == len(indices) else part[here]
                    self._put(part, [indices[place] for place in here], mine)

    def _put(self, frames: Pixels, indices: list[int], views: Sequence[tuple[_View, Pixels]]) -> None:
        """Resize frames of a video, of which `indices` are the numbers, into their places in views."""
        first, rows = views[0]
        inside = rows[_stretch(first.frames, indices)]
        cut = resize(frames, self._source.size, inside if len(inside) else None)
        places = {index: place for place, index in enumerate(indices)}
        for view, rows in views:
            for row, index in zip(rows, view.frames, strict=True):
                place = places.get(index)
                if place is not None and not np.may_share_memory(row, cut[place]):
                    row[...] = cut[place]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        stage(name)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started


class SampleReader(ViewReader):
    """Turns the samples of an opened source into views."""

    def __init__(self, opened: OpenSource) -> None:
        """Open what the samples are read from.

        Errors:
            DataError: the source's FFCV file is missing, or of other shards.
        """
        manifest = opened.manifest
        shards = ShardReader(manifest.folder, opened.name, remote=manifest.remote)
        super().__init__(opened.source, shards, open_beton(opened))
        self._opened = opened

    def info(self, index: int) -> SampleInfo:
        """What the manifest says of the sample at a place of the source's selection."""
        return self._opened.manifest.sample(int(self._opened.selection[index]))

    def describe(self, index: int) -> str:
        """A sample of the selection in words."""
        info = self.info(index)
        return f"sample {info.key} (source {self._opened.name}, shard {info.shard}, offset {info.offset})"


def _part(frames: Pixels, box: Box) -> Pixels:
    """A box of frames (n, height, width, 3)."""
    return frames[:, box.top : box.top + box.height, box.left : box.left + box.width]


def _stretch(frames: Sequence[int], indices: list[int]) -> slice:
    """Where `indices` stand one after another among `frames`; an empty place where they do not."""
    start = frames.index(indices[0]) if indices[0] in frames else 0
    places = slice(start, start + len(indices))
    return places if list(frames[places]) == indices else slice(0)


def _mirror(rows: Pixels) -> None:
    """Turn frames (n, height, width, 3) left for right; torch does it ten times as fast as numpy."""
    for row in rows:
        row[...] = torch.from_numpy(row).flip(1).numpy()


def _bounding_box(boxes: Sequence[Box]) -> Box:
    """The smallest box around all boxes."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom = max(box.top + box.height for box in boxes)
    right = max(box.left + box.width for box in boxes)
    return Box(top, left, bottom - top, right - left)
