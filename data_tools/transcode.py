"""Encoding anew for fast decoding: by the encoders inside PyAV, one thread, the same bytes every time.

Videos become H.264 in mp4 without sound, with no B frames and closed groups of pictures. The times of frames
are kept, so a variable rate stays one; rotation stored beside the frames is dropped, as everywhere here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, cast

import av
import av.error
import av.filter
from av.codec.codec import UnknownCodecError
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream
from PIL import Image

from data_tools.presets import Preset
from data_tools.probe import Media, WholeVideo, open_source, probe
from data_tools.readers import Reader, Unusable
from framework.data.image import decode_image
from framework.data.video import Undecodable
from framework.errors import DataError

__all__ = ["add_h264_stream", "transcode_image", "transcode_video"]

_REPEATABLE = "threads=1:open-gop=0:no-mbtree=1"
"""x264's macroblock tree makes other bytes of the same frames now and then, so it is off."""

_CLOCK = Fraction(1, 90_000)
_EARLY = 1e-4  # seconds by which rounding may move a frame's time over an edge


def transcode_image(data: bytes, preset: Preset, suffix: str) -> tuple[bytes, Media]:
    """`data` as a JPEG whose short side is at most the preset's.

    A JPEG that is small enough stays as it is. Raises Unusable for what is not a whole image.
    """
    media = probe(data, "image", suffix)
    small = min(media.width, media.height) <= preset.short_side
    if small and media.extension == "jpg":
        return data, media
    try:
        image = Image.fromarray(decode_image(data, simplejpeg=False))
    except Undecodable as error:
        raise Unusable(f"damaged: {error}") from error
    if not small:
        scale = preset.short_side / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=preset.quality, optimize=True)
    encoded = buffer.getvalue()
    return encoded, probe(encoded, "image", "jpg")


def transcode_video(
    reader: Reader, preset: Preset, segment: tuple[float, float] | None = None
) -> tuple[bytes, Media]:
    """The video, or those of its frames whose time is in `segment` (seconds, the end not included), encoded.

    Raises Unusable for what does not decode, for a truncated source, and for a segment without frames;
    DataError where this PyAV cannot encode.
    """
    if preset.keeps_bytes:
        raise ValueError("the preset `archive` encodes nothing")
    if not reader.size:
        raise Unusable("empty file (0 bytes)")
    with reader.open() as file, open_source(file) as (source, stream):
        frames = _decoded(source, stream, segment)
        if preset.fps and float(stream.average_rate or 0) > preset.fps + 0.01:
            frames = _thin(frames, preset.fps)
        try:
            encoded = _encode(frames, stream, preset)
        except (av.error.FFmpegError, ValueError) as error:
            raise Unusable(f"decodes, but its frames cannot be encoded as H.264: {error}") from error
        if encoded is None:
            raise Unusable(_without_frames(source, segment))
    return encoded, probe(encoded, "video", "mp4")


def add_h264_stream(target: OutputContainer, rate: Fraction | int, settings: dict[str, str]) -> VideoStream:
    """A stream of H.264 in a file that is written.

    Errors:
        DataError: this PyAV has no encoder for it.
    """
    try:
        return target.add_stream("libx264", rate=rate, options=settings)
    except UnknownCodecError as error:
        raise DataError("this PyAV has no H.264 encoder (libx264): install the wheel from PyPI") from error


def _without_frames(source: InputContainer, segment: tuple[float, float] | None) -> str:
    if segment is None:
        return "truncated or damaged: no frame decodes"
    length = f"; the video is {source.duration / av.time_base:.2f} s long" if source.duration else ""
    return f"no frame between {segment[0]:.3f} and {segment[1]:.3f} s{length}"


Timed = tuple[av.VideoFrame, float]
"""A frame and its time in seconds from the start of the video."""


def _decoded(
    source: InputContainer, stream: VideoStream, segment: tuple[float, float] | None
) -> Iterator[Timed]:
    """All frames, or those of a segment; Unusable where they do not decode."""
    try:
        if segment is None:
            yield from _timed(source, stream, WholeVideo(source, stream).frames())
        else:
            yield from _cut(source, stream, segment)
    except (av.error.FFmpegError, ValueError) as error:
        raise Unusable(f"truncated or damaged: {error}") from error


def _timed(source: InputContainer, stream: VideoStream, frames: Iterator[av.VideoFrame]) -> Iterator[Timed]:
    """Frames with their times; counted where the container has none (AVI), or not for this frame."""
    rate = float(stream.average_rate or 25)
    origin = float((stream.start_time or 0) * cast(Fraction, stream.time_base))
    for number, frame in enumerate(frames):
        told = _tells_times(source) and frame.time is not None
        yield frame, cast(float, frame.time) - origin if told else number / rate


def _tells_times(source: InputContainer) -> bool:
    return source.format.name != "avi"


def _cut(source: InputContainer, stream: VideoStream, segment: tuple[float, float]) -> Iterator[Timed]:
    """Frames of a segment; decoding starts at the key frame before it and ends with it."""
    start, end = segment
    if start > 1 and _tells_times(source):
        base = cast(Fraction, stream.time_base)
        try:
            source.seek(int(start / base) + (stream.start_time or 0), stream=stream, backward=True)
        except av.error.FFmpegError:
            source.seek(0)
    for frame, time in _timed(source, stream, source.decode(stream)):
        if time >= end - _EARLY:
            return
        if time >= start - _EARLY:
            yield frame, time


def _thin(frames: Iterator[Timed], fps: float) -> Iterator[Timed]:
    """Leave out frames that come faster than `fps`, evenly."""
    origin: float | None = None
    taken = 0
    for frame, time in frames:
        origin = time if origin is None else origin
        if (time - origin) * fps + 1e-3 >= taken:
            taken = max(taken + 1, int((time - origin) * fps) + 1)
            yield frame, time


def _encode(frames: Iterator[Timed], source: VideoStream, preset: Preset) -> bytes | None:
    """The frames as H.264 in mp4; None if there are none."""
    first = next(frames, None)
    if first is None:
        return None
    buffer = io.BytesIO()
    scaler = _Scaler(first[0], preset.short_side)
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as target:
        output = _output(target, source, scaler, first[0], preset)
        last = -1
        for frame, time in _chain(first, frames):
            picture = scaler(frame)
            picture.pts = max(last + 1, round((time - first[1]) / _CLOCK))
            picture.time_base, last = _CLOCK, picture.pts
            picture.pict_type = cast(Any, 0)  # else the source's key frames would be key frames again
            target.mux(output.encode(picture))
        target.mux(output.encode())
    return buffer.getvalue()


def _chain(first: Timed, rest: Iterator[Timed]) -> Iterator[Timed]:
    yield first
    yield from rest


def _output(
    target: OutputContainer, source: VideoStream, scaler: _Scaler, frame: av.VideoFrame, preset: Preset
) -> VideoStream:
    """The stream that is written: sizes, colours and x264's settings."""
    tune = {"tune": "fastdecode"} if preset.fastdecode else {}
    settings = {
        "preset": "medium", "crf": str(preset.crf), "g": str(preset.gop), "bf": "0",
        "x264-params": _REPEATABLE, "flags": "+bitexact+cgop", **tune,
    }  # fmt: skip
    output = add_h264_stream(target, source.average_rate or 25, settings)
    output.width, output.height = scaler.size
    output.pix_fmt = "yuv420p"
    context = output.codec_context
    context.thread_count = 1
    context.time_base = _CLOCK
    output.time_base = _CLOCK
    # What the numbers mean must be said again, or a decoder takes other colours for them.
    context.color_range, context.colorspace = frame.color_range, frame.colorspace
    return output


class _Scaler:
    """Frames to even sizes with a bounded short side, in 4:2:0, by swscale's exact ways."""

    def __init__(self, frame: av.VideoFrame, short_side: int) -> None:
        scale = min(1.0, short_side / min(frame.width, frame.height))
        self.size = tuple(max(2, 2 * round(side * scale / 2)) for side in (frame.width, frame.height))
        self._given: tuple[int, int, str] | None = None
        self._graph: Any = None

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame in the new size; a frame of another size than those before gets a graph of its own."""
        given = (frame.width, frame.height, frame.format.name)
        if given != self._given:
            self._given, self._graph = given, self._build(frame)
        self._graph.push(frame)
        return self._graph.pull()

    def _build(self, frame: av.VideoFrame) -> Any:
        graph = av.filter.Graph()
        width, height = self.size
        chain = (
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=_CLOCK),
            graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"),
            graph.add("format", "yuv420p"),
            graph.add("buffersink"),
        )
        graph.link_nodes(*chain).configure()
        return graph
