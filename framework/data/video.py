"""From video bytes to RGB frames: exactly those that are asked for, on one thread.

Frame indices count the frames that a decoder puts out when it runs through the whole file, which is what the
manifest counted. Display matrices (a rotation stored beside the frames) are not applied: the manifest's width
and height describe the pixels as stored.

PyAV decodes. With the packets' times known it starts at the nearest key frame and passes over frames that
nothing refers to and nobody wants, which makes it faster than torchcodec where there are B frames and about
equal elsewhere (`benchmarks/results/decode.md`), and it gives the same pixels on every machine. torchcodec
stays as the second backend, the independent witness that tests and benchmarks compare with.
"""

from __future__ import annotations

import bisect
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import av
import av.container
import av.error
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from framework.data.limits import CONTAINER_OPTIONS, MAX_FRAME_SIDE

__all__ = [
    "Backend",
    "Box",
    "NoContainer",
    "Undecodable",
    "VideoRequest",
    "check_frame_size",
    "decode_video",
    "open_video",
    "pyav_frames",
]

log = logging.getLogger(__name__)

Backend = Literal["torchcodec", "pyav"]
Frames = NDArray[np.uint8]

_CHUNK_BYTES = 1 << 26
_TIMED_FORMATS = {"mp4", "matroska", "webm"}
_RESTART_GAIN = 4  # frames that a restart at a later key frame must save to be worth its flush


class Undecodable(ValueError):
    """Bytes that do not decode to what is expected; the reader adds which sample it was."""


class NoContainer(Undecodable):
    """Bytes that FFmpeg does not even open as a file of media."""


class Box(NamedTuple):
    """A rectangle of pixels in a frame."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class VideoRequest:
    """Which frames of a video are wanted, and what the manifest knows about it.

    `wanted` are frame indices, ascending and without repeats; `total` is the number of decodable frames,
    `keyframes` the indices of its key frames, `height` and `width` the size of its frames in pixels; only
    `box` of each frame is returned (None: all of it).
    """

    wanted: Sequence[int]
    total: int
    height: int
    width: int
    keyframes: Sequence[int] = field(default=())
    box: Box | None = None

    @property
    def area(self) -> Box:
        """The rectangle that is returned."""
        return self.box or Box(0, 0, self.height, self.width)


def decode_video(
    data: bytes, request: VideoRequest, backend: Backend = "pyav"
) -> Iterator[tuple[NDArray[np.int64], Frames]]:
    """Yield the wanted frames in order, in chunks that bound memory.

    Each chunk is (indices (n,), frames uint8 (n, height, width, 3) of the request's box).

    Errors:
        Undecodable: the bytes are no video, a wanted frame does not come out, or frames are too large.
    """
    check_frame_size(request.width, request.height)
    if not request.wanted or request.wanted[-1] >= request.total or request.wanted[0] < 0:
        raise Undecodable(f"frames {list(request.wanted)} asked of a video of {request.total}")
    if backend == "torchcodec":
        from framework.data.video_torchcodec import torchcodec_frames  # optional, and it needs this module

        return _chunks(torchcodec_frames(data, request), request)
    return _chunks(pyav_frames(data, request), request)


def _chunks(frames: Iterator[Frames], request: VideoRequest) -> Iterator[tuple[NDArray[np.int64], Frames]]:
    """Collect single frames into arrays of at most `_CHUNK_BYTES`."""
    wanted = np.asarray(request.wanted, np.int64)
    _, _, height, width = request.area
    length = min(len(wanted), max(1, _CHUNK_BYTES // (height * width * 3)))
    for start in range(0, len(wanted), length):
        indices = wanted[start : start + length]
        chunk = np.empty((len(indices), height, width, 3), np.uint8)
        for row, index in enumerate(indices):
            frame = next(frames, None)
            if frame is None:
                raise Undecodable(f"frame {index} of {request.total} does not come out of the decoder")
            chunk[row] = frame
        yield indices, chunk


class _Missed(Exception):
    """The quick way lost a frame; only running through the whole file tells."""


def pyav_frames(data: bytes, request: VideoRequest) -> Iterator[Frames]:
    """The wanted frames by the quick way; from the first one that it loses on, by the sure way.

    Each is (height, width, 3) of the request's box, and only valid until the next one is taken.
    """
    area = request.area
    reformatter = VideoReformatter()  # one for all frames: making one costs as much as converting a frame
    given = 0
    for decoder in (_indexed_decode, _sequential_decode):
        try:
            for frame in decoder(data, request, request.wanted[given:]):
                yield _rgb(reformatter, frame, request, area)
                given += 1
            return
        except _Missed:
            log.debug("decoding from the start: the packets do not tell where frame %d is", given)
        except (av.error.FFmpegError, ValueError, OverflowError) as error:
            if isinstance(error, Undecodable):
                raise
            if decoder is _sequential_decode:
                raise Undecodable(f"{type(error).__name__}: {error}") from error


def _rgb(reformatter: VideoReformatter, frame: av.VideoFrame, request: VideoRequest, area: Box) -> Frames:
    """The request's box of a decoded frame as a view (height, width, 3) of its RGB conversion."""
    # A file may change its frame size in the middle; all frames are brought to the size of the manifest.
    converted = reformatter.reformat(
        frame, width=request.width, height=request.height, format="rgb24", threads=1
    )
    plane = converted.planes[0]
    rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)[: request.height]
    pixels = rows[:, : request.width * 3].reshape(request.height, request.width, 3)
    return pixels[area.top : area.top + area.height, area.left : area.left + area.width]


@contextmanager
def open_video(file: BinaryIO) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A container that may come from a stranger, and its video stream, ready to be decoded on one thread.

    It opens no playlists and no other files, and takes metadata of any encoding.

    Errors:
        NoContainer: the bytes are none that FFmpeg opens.
        Undecodable: there is no video in it, nothing decodes its codec, or frames are too large.
    """
    try:
        container = av.open(file, "r", metadata_errors="ignore", options=dict(CONTAINER_OPTIONS))
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        raise NoContainer(f"{type(error).__name__}: {error}") from error
    with container:
        yield container, _video_stream(container)


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    streams = container.streams.video
    if not streams or streams[0].disposition & Disposition.attached_pic:  # the cover of a piece of music
        other = "audio only" if container.streams.audio else "no sound either"
        raise Undecodable(f"no video in it ({other}): there is no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None:  # PyAV's types do not say that it may be, where nothing decodes the stream
        raise Undecodable("its codec is not known to this FFmpeg")
    check_frame_size(context.width, context.height)
    stream.thread_type = "NONE"  # frame threads deadlock in forked workers, and cores are full already
    return stream


def check_frame_size(width: int, height: int) -> None:
    """Refuse frames whose pixels would fill the memory.

    Errors:
        Undecodable: a side is longer than `MAX_FRAME_SIDE`.
    """
    if max(width, height) > MAX_FRAME_SIDE:
        raise Undecodable(f"frames of {width}x{height} pixels; at most {MAX_FRAME_SIDE} a side")


def _sequential_decode(data: bytes, request: VideoRequest, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
    """Decode from the start and count: right for every file, whatever its timestamps say."""
    targets, last = set(wanted), wanted[-1]
    with open_video(io.BytesIO(data)) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in targets:
                yield frame
            if index >= last:
                return


def _indexed_decode(data: bytes, request: VideoRequest, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
    """Decode from the nearest key frames, leaving out what no wanted frame needs.

    The presentation times of all packets, sorted, give each frame its index. Decoding starts at the packet of
    the last key frame before a wanted frame; frames that nothing refers to and nobody wants are skipped.

    Errors:
        _Missed: the packets do not tell reliably which frame is which, or a frame did not come out.
    """
    with open_video(io.BytesIO(data)) as (container, stream):
        if not _TIMED_FORMATS.intersection(container.format.name.split(",")):
            raise _Missed  # AVI and its like store no presentation times, and FFmpeg guesses wrong
        packets = [packet for packet in container.demux(stream) if packet.size > 0]
        times = {packet.pts for packet in packets if not packet.is_discard}
        if None in times or len(times) != request.total or len(packets) != request.total:
            raise _Missed
        table = sorted(cast(set[int], times))
        if stream.codec_context.has_b_frames and table == [packet.pts for packet in packets]:
            raise _Missed  # frames are stored out of order, but their times are not: the times were made up
        starts = _start_packets(packets, table, request.keyframes)
        codec = stream.codec_context
        codec.open(strict=False)  # before skip_frame changes: dav1d reads it here, and would skip for good
        for number, (key, indices) in enumerate(_stretches(wanted, sorted(starts))):
            if number > 0:
                codec.flush_buffers()
            yield from _decode_stretch(codec, packets[starts[key] :], [table[index] for index in indices])


def _stretches(wanted: Sequence[int], keys: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Frames to decode in one go, each with the key frame to start from; `keys` are ascending from 0.

    A stretch goes on over key frames as long as a restart would save next to nothing.
    """
    stretches: list[tuple[int, list[int]]] = []
    for index in wanted:
        key = keys[bisect.bisect_right(keys, index) - 1]
        if stretches and key - stretches[-1][1][-1] <= _RESTART_GAIN:
            stretches[-1][1].append(index)
        else:
            stretches.append((key, [index]))
    return stretches


def _start_packets(
    packets: Sequence[av.Packet[Any]], table: Sequence[int], keyframes: Sequence[int]
) -> dict[int, int]:
    """Places in `packets` where decoding may start: those key frames that manifest and packets agree on."""
    places = {packet.pts: place for place, packet in enumerate(packets) if packet.is_keyframe}
    starts = {int(key): places[table[key]] for key in keyframes if key < len(table) and table[key] in places}
    starts.setdefault(0, 0)
    return starts


def _decode_stretch(codec: Any, packets: Sequence[Any], times: Sequence[int]) -> Iterator[av.VideoFrame]:
    """The frames with the given ascending presentation times, decoded from the first packet on."""
    targets, given, before = set(times), 0, None
    for packet in [*packets, None]:
        if packet is not None:
            codec.skip_frame = "DEFAULT" if packet.pts in targets else "NONREF"
        for frame in codec.decode(packet):
            if frame.pts is None or (before is not None and frame.pts <= before):
                raise _Missed
            before = frame.pts
            if frame.pts not in targets:
                continue
            if frame.pts != times[given]:
                raise _Missed
            yield frame
            given += 1
            if given == len(times):
                return
    raise _Missed
