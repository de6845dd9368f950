"""Single files as samples: what a manifest would say of them, and a reader that has nothing but them."""

from __future__ import annotations

import io
from pathlib import Path

import av.error
import numpy as np
from PIL import UnidentifiedImageError
from zlib_ng.zlib_ng import crc32

from framework.data.image import decode_image
from framework.data.manifest import Kind, SampleInfo
from framework.data.shards import ShardReader
from framework.data.video import NoContainer, Undecodable, open_video
from framework.errors import DataError

__all__ = ["OneFile", "describe_file"]


MAX_FILE_BYTES = 4 << 30


def describe_file(path: Path) -> SampleInfo:
    """Decode a video or an image once, and describe it as the manifest describes a sample.

    Errors:
        DataError: no such file, a larger one than `MAX_FILE_BYTES`, neither a video nor an image, or one that
            cannot be decoded.
    """
    try:
        size = path.stat().st_size if path.is_file() else 0
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is no file")
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{path}: {size / 2**30:.1f} GiB, at most {MAX_FILE_BYTES >> 30}, as a file is read whole: "
                "cut a clip out of it"
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    found = _image(path, data) or _video(path, data)
    if found is None:
        raise DataError(f"{path}: is neither a video nor an image that can be decoded")
    return found


class OneFile(ShardReader):
    """Reads one file wherever a shard is expected."""

    def __init__(self, path: Path, source: str) -> None:
        super().__init__(path.parent, source)
        self._path = path

    def read(self, sample: SampleInfo) -> bytes:
        """All bytes of the file."""
        return self._path.read_bytes()


def _image(path: Path, data: bytes) -> SampleInfo | None:
    """The description of an image; None if the bytes do not even begin as one."""
    try:
        height, width = decode_image(data).shape[:2]
    except Undecodable as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return None
        raise DataError(f"{path}: is an image that cannot be decoded ({error})") from error
    return _info(path, data, "image", (width, height), 1, 0.0, [])


def _video(path: Path, data: bytes) -> SampleInfo | None:
    """The description of a video; None if the bytes are no container, or no frame comes out of it."""
    times: list[float] = []
    keyframes: list[int] = []
    size, frames, rate = (0, 0), 0, 0.0
    try:
        with open_video(io.BytesIO(data)) as (container, stream):
            rate = float(stream.average_rate or 0)
            for frame in container.decode(stream):
                size = size if frames else (frame.width, frame.height)
                keyframes += [frames] if frame.key_frame else []
                times += [frame.time] if frame.time is not None else []
                frames += 1
    except NoContainer:
        return None
    except Undecodable as error:
        raise DataError(f"{path}: is a file of media that cannot be used ({error})") from error
    except (av.error.FFmpegError, ValueError, OverflowError):
        if not frames:
            return None  # what decoded before the damage can still be classified
    if not frames:
        return None
    if len(times) > 1 and times[-1] > times[0]:
        rate = (len(times) - 1) / (times[-1] - times[0])
    return _info(path, data, "video", size, frames, rate, keyframes)


def _info(
    path: Path, data: bytes, kind: Kind, size: tuple[int, int], frames: int, fps: float, keyframes: list[int]
) -> SampleInfo:
    return SampleInfo(
        index=0,
        key=path.name,
        shard=path.name,
        offset=0,
        length=len(data),
        crc32=crc32(data),
        dataset="",
        kind=kind,
        label=-1,
        width=size[0],
        height=size[1],
        frames=frames,
        fps=fps or 25.0 if kind == "video" else 0.0,
        keyframes=np.asarray(keyframes, np.uint32),
        extension=path.suffix.removeprefix("."),
    )
