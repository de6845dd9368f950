"""Looking at a media file by decoding all of it: what a manifest says of a sample must be true.

Containers lie: a file may claim frames that are not there, and decoders pass over that in silence. So every
frame is decoded once, here, and what cannot be used is refused with a reason for a person.

Tolerance. Real clips often claim a frame or two more than they hold (rounded durations, edit lists). A video
is truncated if more than 2 % of the claimed frames (and more than one) are lacking or decode with errors. The
claim is the container's frame count less packets marked as discarded; for containers without one (Matroska,
WebM) it is the duration, compared with the end of the last packet of any video or audio stream.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import av
import av.error
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from data_tools.readers import Unusable
from framework.data.limits import IMAGE_FORMATS, MAX_IMAGE_PIXELS
from framework.data.manifest import Kind
from framework.data.video import NoContainer, Undecodable, check_frame_size, open_video

__all__ = ["Media", "WholeVideo", "open_source", "probe"]

_TOLERANCE = 0.02
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what is wrong with a file goes to the report
_IMAGE_SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}


@dataclass(frozen=True, slots=True)
class Media:
    """What decoding showed; sizes in pixels, `fps` 0 for images, `extension` fit for a member of a shard."""

    width: int
    height: int
    frames: int
    fps: float
    keyframes: tuple[int, ...]
    extension: str


@dataclass(slots=True)
class _Seen:
    """What came out of a video so far; times in seconds."""

    frames: int = 0
    corrupt: int = 0
    discarded: int = 0
    keyframes: list[int] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    first: float | None = None
    last: float | None = None
    end: float = 0.0


def probe(data: bytes, kind: Kind, suffix: str) -> Media:
    """Decode all of `data`; raises Unusable with the reason if it is not a whole medium of that kind."""
    if not data:
        raise Unusable("empty file (0 bytes)")
    return _probe_video(data, suffix) if kind == "video" else _probe_image(data)


def _probe_image(data: bytes) -> Media:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that we refuse anyway
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    raise Unusable(
                        f"too large: {width}x{height} pixels, at most {MAX_IMAGE_PIXELS} are allowed"
                    )
                image.convert("RGB")
                suffix = _IMAGE_SUFFIXES[image.format or ""]
    except Image.DecompressionBombError as error:
        raise Unusable(f"too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise Unusable(_describe_unknown(data, "image")) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        what = "truncated" if "truncated" in str(error) else "damaged"
        raise Unusable(f"{what}: {error}") from error
    return Media(width, height, 1, 0.0, (), suffix)


def _probe_video(data: bytes, suffix: str) -> Media:
    with open_source(io.BytesIO(data)) as (container, stream):
        video = WholeVideo(container, stream)
        for _ in video.frames():
            pass
        width, height = video.size
        return Media(width, height, video.count, video.fps, tuple(video.keyframes), suffix)


@contextmanager
def open_source(file: BinaryIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video and its stream, on one thread; Unusable with the reason if there is none to be decoded."""
    with ExitStack() as stack:
        try:
            container, stream = stack.enter_context(open_video(file))
        except NoContainer as error:
            file.seek(0)
            raise Unusable(_describe_unknown(file.read(512), "video")) from error
        except Undecodable as error:
            raise Unusable(str(error)) from error
        stream.codec_context.thread_count = 1  # many workers, one thread each; some decoders have their own
        yield container, stream


class WholeVideo:
    """All frames of an open video, and whether they are as many as the container claims."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container = container
        self._stream = stream
        self._seen = _Seen()

    @property
    def count(self) -> int:
        """Frames so far."""
        return self._seen.frames

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames."""
        return self._seen.size

    @property
    def keyframes(self) -> list[int]:
        """Indices of the key frames so far."""
        return self._seen.keyframes

    @property
    def fps(self) -> float:
        """Mean rate of the frames so far."""
        return _fps(self._stream, self._seen)

    def frames(self) -> Iterator[av.VideoFrame]:
        """Every frame; raises Unusable where it turns out that the video is not whole."""
        container, stream, seen = self._container, self._stream, self._seen
        try:
            yield from _decode_all(container, stream, seen)
        except (av.error.FFmpegError, ValueError) as error:
            claimed = _claimed_frames(container, stream, seen)
            detail = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
            raise Unusable(
                f"truncated or damaged: {seen.frames}{claimed} frames decode ({detail})"
            ) from error
        _check_complete(container, stream, seen)


def _decode_all(container: InputContainer, stream: VideoStream, seen: _Seen) -> Iterator[av.VideoFrame]:
    wanted = [stream, *container.streams.audio]
    for packet in container.demux(wanted):
        if packet.pts is not None and packet.time_base is not None:
            seen.end = max(seen.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        seen.discarded += packet.is_discard
        for frame in cast("list[av.VideoFrame]", packet.decode()):
            size = (frame.width, frame.height)
            if seen.frames == 0:
                _check_size(*size)
                seen.size, seen.first = size, frame.time
            elif size != seen.size:
                raise Unusable(
                    f"the frame size changes from {seen.size[0]}x{seen.size[1]} to {size[0]}x{size[1]}"
                    f" at frame {seen.frames}"
                )
            if frame.key_frame:
                seen.keyframes.append(seen.frames)
            seen.corrupt += frame.is_corrupt
            seen.last = frame.time
            seen.frames += 1
            yield frame


def _check_size(width: int, height: int) -> None:
    """Of frames as they come out: the container may have said something smaller."""
    try:
        check_frame_size(width, height)
    except Undecodable as error:
        raise Unusable(str(error)) from error


def _check_complete(container: InputContainer, stream: VideoStream, seen: _Seen) -> None:
    """Compare what decoded with what the container claims; the tolerance is explained at the top."""
    if seen.frames == 0:
        raise Unusable(f"truncated or damaged: 0{_claimed_frames(container, stream, seen)} frames decode")
    good = seen.frames - seen.corrupt
    claim = max(stream.frames - seen.discarded, seen.frames) if stream.frames else seen.frames
    if claim - good > max(1, math.ceil(_TOLERANCE * claim)):
        if claim == seen.frames:
            raise Unusable(f"damaged: {seen.corrupt} of {claim} frames decode with errors")
        raise Unusable(f"truncated: {good} of {claim} frames decode")
    if not stream.frames and container.duration:
        duration = container.duration / av.time_base
        start = (container.start_time or 0) / av.time_base
        lacking = duration - (seen.end - start)
        fps = _fps(stream, seen)
        if lacking > max(2 / fps if fps else 0.1, _TOLERANCE * duration):
            raise Unusable(f"truncated: {good} of about {round(duration * fps)} frames decode")


def _claimed_frames(container: InputContainer, stream: VideoStream, seen: _Seen) -> str:
    if stream.frames:
        return f" of {stream.frames - seen.discarded}"
    if container.duration and stream.average_rate:
        return f" of about {round(container.duration / av.time_base * float(stream.average_rate))}"
    return ""


def _fps(stream: VideoStream, seen: _Seen) -> float:
    """Mean rate between the first and the last frame; the container's word only where there are no times."""
    if seen.frames > 1 and seen.first is not None and seen.last is not None and seen.last > seen.first:
        return (seen.frames - 1) / (seen.last - seen.first)
    return float(stream.average_rate or 0)


def _describe_unknown(data: bytes, kind: Kind) -> str:
    """Why a file did not even open, guessed from its first bytes."""
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return f"not media: a web page instead of {'a video' if kind == 'video' else 'an image'}"
    if data[4:8] == b"ftyp":
        return "truncated or damaged: an mp4 file whose index cannot be read"
    if data[:4] in (b"\x1a\x45\xdf\xa3", b"RIFF", b"OggS", b"FLV\x01"):
        return "truncated or damaged: a video container that cannot be opened"
    if data[:2] == b"\xff\xd8" or data[:4] == b"\x89PNG":
        return (
            "an image instead of a video"
            if kind == "video"
            else "truncated or damaged: not even its head can be read"
        )
    return f"not media: no {kind} format that can be read begins like this ({data[:12]!r})"
