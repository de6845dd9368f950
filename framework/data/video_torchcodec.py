"""Video frames by torchcodec, the second backend: see `framework.data.video`."""

from __future__ import annotations

import functools
import importlib
import io
import logging
from collections.abc import Iterator

import av
import numpy as np
from numpy.typing import NDArray

from framework.data.video import Undecodable, VideoRequest, pyav_frames

__all__ = ["torchcodec_frames", "torchcodec_works"]

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 26


def torchcodec_frames(data: bytes, request: VideoRequest) -> Iterator[NDArray[np.uint8]]:
    """The wanted frames by torchcodec, or by PyAV for files whose frames torchcodec counts differently."""
    decoders = importlib.import_module("torchcodec.decoders")
    if data[4:8] != b"ftyp" and data[:4] != b"\x1a\x45\xdf\xa3":
        # Neither mp4 nor Matroska: torchcodec orders frames by times that FFmpeg had to guess.
        yield from pyav_frames(data, request)
        return
    try:
        decoder = decoders.VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        about = decoder.metadata
        fits = about.num_frames == request.total and (about.height, about.width) == (
            request.height,
            request.width,
        )
    except (RuntimeError, ValueError) as error:
        raise Undecodable(f"torchcodec: {error}") from error
    if not fits:
        yield from pyav_frames(data, request)
        return
    area = request.area
    rows, columns = slice(area.top, area.top + area.height), slice(area.left, area.left + area.width)
    length = max(1, _CHUNK_BYTES // (request.height * request.width * 3))
    for start in range(0, len(request.wanted), length):
        try:
            batch = decoder.get_frames_at(indices=list(request.wanted[start : start + length])).data
        except (RuntimeError, IndexError) as error:
            raise Undecodable(f"torchcodec: {error}") from error
        yield from batch.numpy()[:, rows, columns]


@functools.cache
def torchcodec_works() -> bool:
    """Whether torchcodec decodes a frame on this machine; that it is installed says little."""
    try:
        frames = list(
            torchcodec_frames(_probe_clip(), VideoRequest(wanted=(1,), total=2, height=32, width=32))
        )
    except (ImportError, OSError, RuntimeError, Undecodable) as error:
        log.info("torchcodec does not work here: %s", str(error).split("\n")[0])
        return False
    return len(frames) == 1 and frames[0].shape == (32, 32, 3)


def _probe_clip() -> bytes:
    """A video of two grey frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 128, np.uint8))))
        container.mux(stream.encode())
    return file.getvalue()
