"""Moving digits: a data set for trials that ships with its ingredients.

The digits are the 1797 handwritten ones inside scikit-learn (8x8 pixels, ten classes). `motion`: a digit
moves in one of eight directions over a canvas without edges (what leaves on one side enters on the other),
encoded as H.264. The start is uniform on that torus, so every single frame is uniform too, whatever the
direction: only the order of frames tells the label. `digits`: a digit at a random place with noise, a JPEG
labelled with the digit. Training and held-out samples use different handwritten digits.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy

from data_tools.items import Collection, Entry, inventory
from data_tools.report import ShardReport
from data_tools.sharding import ShardOptions, shard
from data_tools.transcode import add_h264_stream
from framework.errors import DataError

__all__ = ["DIRECTIONS", "DigitPicture", "MotionClip", "SynthOptions", "synthesize"]

DIRECTIONS = {
    "e": (1, 0), "ne": (1, -1), "n": (0, -1), "nw": (-1, -1),
    "w": (-1, 0), "sw": (-1, 1), "s": (0, 1), "se": (1, 1),
}  # fmt: skip
"""Steps to the right and downwards; labels in this order."""

_SPEEDS = (2, 3)  # pixels a frame
_FPS = 8
_VALIDATION_SHARE = 5  # every fifth handwritten digit is held out
_NOISE = 12.0
_JPEG_QUALITY = 90
_Digit = tuple[int, int, bytes]  # (number of the handwritten sample, the digit, its 64 pixels)


@dataclass(frozen=True)
class SynthOptions:
    """How much is made; `size` is the side of the canvas in pixels."""

    out: Path
    size: int = 32
    frames: int = 16
    train_videos: int = 4096
    val_videos: int = 512
    train_images: int = 4096
    val_images: int = 512
    seed: int = 0
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 2:
            raise DataError(
                f"--size must be even and at least 16, not {self.size} (H.264 halves the colours)"
            )
        if self.frames < 2:
            raise DataError(f"--frames must be at least 2, not {self.frames}: one frame does not move")


@dataclass(frozen=True, slots=True)
class MotionClip:
    """A clip to be drawn and encoded; place and step in pixels."""

    pixels: bytes
    canvas: int
    frames: int
    place: tuple[int, int]
    step: tuple[int, int]

    @property
    def size(self) -> int:
        """About how many bytes the mp4 file will have."""
        return 1500 + self.canvas * self.canvas * self.frames // 8

    def read(self) -> bytes:
        """The clip as an mp4 file."""
        return _encode_video(self.draw())

    def open(self) -> BinaryIO:
        """The clip as a file."""
        return io.BytesIO(self.read())

    def draw(self) -> numpy.ndarray:
        """Grey frames, uint8 (frames, canvas, canvas)."""
        sheet = numpy.zeros((self.canvas, self.canvas), numpy.uint8)
        digit = _enlarge(self.pixels, self.canvas // 2)
        sheet[: digit.shape[0], : digit.shape[1]] = digit
        moves = range(self.frames)
        shifts = [(self.place[1] + t * self.step[1], self.place[0] + t * self.step[0]) for t in moves]
        return numpy.stack([numpy.roll(sheet, shift, axis=(0, 1)) for shift in shifts])


@dataclass(frozen=True, slots=True)
class DigitPicture:
    """A picture to be drawn and compressed; `place` is the upper left corner of the digit in pixels."""

    pixels: bytes
    canvas: int
    place: tuple[int, int]
    noise: int

    @property
    def size(self) -> int:
        """About how many bytes the JPEG file will have."""
        return 400 + self.canvas * self.canvas // 2

    def read(self) -> bytes:
        """The picture as a JPEG file."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.draw()).convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return buffer.getvalue()

    def open(self) -> BinaryIO:
        """The picture as a file."""
        return io.BytesIO(self.read())

    def draw(self) -> numpy.ndarray:
        """Grey pixels, uint8 (canvas, canvas)."""
        sheet = numpy.random.default_rng(self.noise).normal(0, _NOISE, (self.canvas, self.canvas))
        digit = _enlarge(self.pixels, digit_side(self.canvas))
        x, y = self.place
        sheet[y : y + digit.shape[0], x : x + digit.shape[1]] += digit
        return sheet.clip(0, 255).astype(numpy.uint8)


def digit_side(canvas: int) -> int:
    """Side of the digit in a picture, in pixels."""
    return canvas * 3 // 4


def synthesize(options: SynthOptions) -> dict[str, ShardReport]:
    """Write the shard sets `out`/train and `out`/val; both are there or none."""
    out = options.out.absolute()
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; choose another --out")
    occupied = out.exists() and any(out.iterdir())
    if occupied and not options.overwrite:
        raise DataError(f"{out}: exists already; choose another --out, or replace it with --overwrite")
    train, validation = _split_digits(options.seed)
    parts = {
        "train": (train, options.train_videos, options.train_images),
        "val": (validation, options.val_videos, options.val_images),
    }
    # Both sets grow in a staging folder; only where old ones are replaced does each change places by itself.
    staging = out if occupied else out.with_name(out.name + ".partial")
    reports: dict[str, ShardReport] = {}
    for stream, (split, (digits, videos, images)) in enumerate(parts.items()):
        random = numpy.random.default_rng([options.seed, stream])
        collections = [
            _motion(digits, split, videos, options, random),
            _pictures(digits, split, images, options, random),
        ]
        shards = ShardOptions(staging / split, options.workers, options.seed, 1024, 256, overwrite=True)
        reports[split] = shard(inventory([c for c in collections if c.entries]), shards)
    if staging is not out:
        staging.rename(out)
    return reports


def _split_digits(seed: int) -> tuple[list[_Digit], list[_Digit]]:
    """Handwritten samples for training and held out, each class in the same proportion."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    order = numpy.random.default_rng([seed, 1797]).permutation(len(targets))
    train: list[_Digit] = []
    validation: list[_Digit] = []
    for digit in range(10):
        for place, number in enumerate(order[targets[order] == digit].tolist()):
            part = validation if place % _VALIDATION_SHARE == 0 else train
            part.append((number, digit, pixels[number].astype(numpy.uint8).tobytes()))
    return train, validation


def _motion(
    digits: Sequence[_Digit], split: str, count: int, options: SynthOptions, random: numpy.random.Generator
) -> Collection:
    """Clips of all directions in turn; digit, start and speed are drawn without regard to the direction."""
    names = tuple(DIRECTIONS)
    entries = []
    for index in range(count):
        number, _, pixels = digits[int(random.integers(len(digits)))]
        x, y = random.integers(options.size, size=2).tolist()
        speed = _SPEEDS[int(random.integers(len(_SPEEDS)))]
        name = names[index % len(names)]
        step = (DIRECTIONS[name][0] * speed, DIRECTIONS[name][1] * speed)
        clip = MotionClip(pixels, options.size, options.frames, (x, y), step)
        entries.append(Entry(f"{name}/{index:06d}-handwritten-{number:04d}.mp4", f"{index:06d}", name, clip))
    return Collection("motion", split, "video", names, entries)


def _pictures(
    digits: Sequence[_Digit], split: str, count: int, options: SynthOptions, random: numpy.random.Generator
) -> Collection:
    """Pictures of all handwritten samples in turn, each time at another place."""
    order = random.permutation(len(digits))
    room = options.size - digit_side(options.size)
    entries = []
    for index in range(count):
        number, digit, pixels = digits[order[index % len(order)]]
        x, y = random.integers(room + 1, size=2).tolist()
        picture = DigitPicture(pixels, options.size, (x, y), int(random.integers(2**32)))
        entries.append(
            Entry(f"{digit}/{index:06d}-handwritten-{number:04d}.jpg", f"{index:06d}", str(digit), picture)
        )
    return Collection("digits", split, "image", tuple(str(digit) for digit in range(10)), entries)


def _enlarge(pixels: bytes, side: int) -> numpy.ndarray:
    """The 8x8 digit (values 0 to 16) as uint8 (side, side)."""
    from PIL import Image

    small = numpy.frombuffer(pixels, numpy.uint8).reshape(8, 8).astype(numpy.uint16) * 255 // 16
    image = Image.fromarray(small.astype(numpy.uint8))
    return numpy.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _encode_video(frames: numpy.ndarray) -> bytes:
    """H.264 in mp4, one thread and no B-frames: equal frames give equal bytes."""
    import av

    buffer = io.BytesIO()
    height, width = frames.shape[1:]
    # the macroblock tree of x264 makes other bytes of the same frames now and then
    settings = {
        "preset": "veryfast",
        "crf": "18",
        "bf": "0",
        "g": "8",
        "x264-params": "threads=1:no-mbtree=1",
    }
    with av.open(buffer, "w", format="mp4") as container:
        stream = add_h264_stream(container, Fraction(_FPS), settings)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            luma = (16 + frame.astype(numpy.uint16) * 219 // 255).astype(numpy.uint8)
            planes = numpy.concatenate([luma, numpy.full((height // 2, width), 128, numpy.uint8)])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
    return buffer.getvalue()
