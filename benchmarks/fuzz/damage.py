"""Media to damage, and the ways to do so."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from PIL import Image

__all__ = ["BROKEN", "DAMAGES", "IN_PLACE", "clips", "flip_bits", "picture", "pictures", "scan_bomb"]

Rng = np.random.Generator
HEIGHT, WIDTH, FRAMES = 48, 64, 20


def _frames(seed: int, count: int = FRAMES) -> np.ndarray:
    """Soft moving frames (count, HEIGHT, WIDTH, 3), each different from all others."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 14, 3), dtype=np.uint8))
    field = np.asarray(coarse.resize((WIDTH + 60, HEIGHT + 60), Image.Resampling.BICUBIC))
    frames = [field[n % 50 : n % 50 + HEIGHT, (2 * n) % 60 : (2 * n) % 60 + WIDTH] for n in range(count)]
    stacked = np.stack(frames).copy()
    for number in range(count):
        stacked[number, :8, : (number * 3) % WIDTH + 1] = (number * 7) % 256
    return stacked


def _video(seed: int, codec: str, container: str, *, frames: int = FRAMES, uneven: bool = False) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.gop_size = 6
        stream.codec_context.thread_count = 1
        tick = Fraction(1, 25) if container == "avi" else Fraction(1, 1000)  # AVI knows one rate alone
        stream.codec_context.time_base = tick
        for number, pixels in enumerate(_frames(seed)[:frames]):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.time_base = tick
            frame.pts = (
                number if container == "avi" else number * 40 * (1 + 2 * uneven) + (number % 5) * 20 * uneven
            )
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def _audio() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16_000)
        silence = np.zeros((1, 16_000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def picture(seed: int, kind: str, **options: object) -> bytes:
    """A whole picture, another for each seed."""
    file = io.BytesIO()
    Image.fromarray(_frames(seed, 1)[0]).save(file, kind, **options)
    return file.getvalue()


def clips(count: int) -> list[tuple[str, bytes]]:
    """Whole videos: (extension, bytes)."""
    kinds = [("mp4", "libx264", "mp4"), ("webm", "libvpx", "webm"), ("mkv", "libx264", "matroska"),
             ("avi", "mpeg4", "avi")]  # fmt: skip
    made = []
    for number in range(count):
        extension, codec, container = kinds[number % len(kinds)]
        made.append(
            (extension, _video(number, codec, container, uneven=number % 3 == 1 and codec == "libx264"))
        )
    return made


def pictures(count: int) -> list[tuple[str, bytes]]:
    """Whole pictures: (extension, bytes)."""
    kinds: list[tuple[str, str, dict[str, object]]] = [
        ("jpg", "JPEG", {"quality": 90}),
        ("png", "PNG", {}),
        ("jpg", "JPEG", {"progressive": True}),
        ("webp", "WEBP", {}),
        ("bmp", "BMP", {}),
        ("tiff", "TIFF", {}),
        ("gif", "GIF", {}),
    ]
    made = []
    for number in range(count):
        extension, kind, options = kinds[number % len(kinds)]
        made.append((extension, picture(1000 + number, kind, **options)))
    return made


def flip_bits(data: bytes, rng: Rng) -> bytes:
    """Up to 64 bits, anywhere."""
    damaged = np.frombuffer(data, np.uint8).copy()
    for place in rng.integers(0, len(damaged), int(rng.integers(1, 65))):
        damaged[place] ^= 1 << int(rng.integers(0, 8))
    return damaged.tobytes()


def _flip_one_bit(data: bytes, rng: Rng) -> bytes:
    place, bit = int(rng.integers(0, len(data))), int(rng.integers(0, 8))
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def _range(data: bytes, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(0, len(data)))
    return start, min(len(data), start + int(rng.integers(1, max(2, len(data) // 4))))


def _zeros(data: bytes, rng: Rng) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _noise(data: bytes, rng: Rng) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + rng.bytes(end - start) + data[end:]


def _wrong_length(data: bytes, rng: Rng) -> bytes:
    """An extreme number where a length may stand: boxes, chunks, segments and tables are full of them."""
    width = int(rng.choice([2, 4]))
    place = int(rng.integers(0, max(1, min(len(data) - width, 4096))))
    number = int(rng.choice([0, 1, 0x7F, 0x7FFF, 0xFFFF])) if width == 2 else int(
        rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data) + 1])
    )  # fmt: skip
    return data[:place] + number.to_bytes(width, "big") + data[place + width :]


def _shuffled(data: bytes, rng: Rng) -> bytes:
    middle = int(rng.integers(1, len(data)))
    return data[middle:] + data[:middle]


def _truncated(data: bytes, rng: Rng) -> bytes:
    """At every level: nothing, one byte, inside the header, anywhere, all but one byte."""
    levels = [0, 1, 16, len(data) // 10, int(rng.integers(0, len(data))), len(data) - 1]
    return data[: levels[int(rng.integers(0, len(levels)))]]


def _lost(data: bytes, rng: Rng) -> bytes:
    start, end = _range(data, rng)
    return data[:start] + data[end:]


def _doubled(data: bytes, rng: Rng) -> bytes:
    start, end = _range(data, rng)
    return data[:end] + data[start:]


IN_PLACE: dict[str, Callable[[bytes, Rng], bytes]] = {
    "bits flipped": flip_bits,
    "one bit flipped": _flip_one_bit,
    "a range of zeros": _zeros,
    "a range of noise": _noise,
    "a wrong length": _wrong_length,
    "halves swapped": _shuffled,
}
"""Damage that keeps the number of bytes."""

DAMAGES = {**IN_PLACE, "truncated": _truncated, "a range lost": _lost, "a range doubled": _doubled}


def scan_bomb(side: int = 4000, scans: int = 20_000) -> bytes:
    """A valid progressive JPEG that repeats its last scan: under a megabyte, minutes to decode."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def _png(width: int, height: int, pixels: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _huge_jpeg() -> bytes:
    data = bytearray(picture(0, "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def _huge_gif() -> bytes:
    data = bytearray(picture(0, "GIF"))
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def _huge_bmp() -> bytes:
    data = bytearray(picture(0, "BMP"))
    data[18:26] = struct.pack("<ii", 100_000, 100_000)
    return bytes(data)


def _no_frames() -> bytes:
    """A film whose tables are there and whose frames are not."""
    data = _video(0, "libx264", "mp4")
    place = data.index(b"mdat")
    size = int.from_bytes(data[place - 4 : place], "big")
    return data[: place + 4] + bytes(size - 8) + data[place - 4 + size :]


BROKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "100k x 100k in the header of a PNG": ("png", lambda: _png(100_000, 100_000, zlib.compress(bytes(1000)))),
    "a PNG of 60k x 60k zeros in 3.5 MB (zip bomb)": (
        "png",
        lambda: _png(60_000, 60_000, zlib.compress(bytes(60_001 * 1000), 9)),
    ),
    "a PNG whose data ends early": ("png", lambda: _png(8_000, 8_000, zlib.compress(bytes(8001 * 10)))),
    "65k x 65k in the header of a JPEG": ("jpg", _huge_jpeg),
    "65k x 65k in the header of a GIF": ("gif", _huge_gif),
    "100k x 100k in the header of a BMP": ("bmp", _huge_bmp),
    "a film without frames": ("mp4", _no_frames),
    "a film of zero frames": ("mp4", lambda: _video(0, "libx264", "mp4", frames=0)),
    "sound alone": ("mp4", _audio),
    "a playlist instead of a film": (
        "mp4",
        lambda: b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    ),
    "a script instead of a picture": (
        "jpg",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    ),
    "a page instead of a picture": ("png", lambda: b"<html><body>404 not found</body></html>"),
    "nothing": ("jpg", lambda: b""),
    "nothing, called a film": ("mp4", lambda: b""),
    "one byte": ("webp", lambda: b"R"),
}
"""Files that are no good: (extension, maker)."""
