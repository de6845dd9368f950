"""Promises of video decoding: index-exact on every container and codec, bounded, and clear when it fails."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest

from framework.data import video
from framework.data.video import Box, NoContainer, Undecodable, VideoRequest, decode_video, open_video
from framework.data.video_torchcodec import torchcodec_works

FRAMES = 60
CASES = {
    "h264 with B frames": {"codec": "libx264", "container": "mp4", "gop": 12, "bframes": 3},
    "h264 without": {"codec": "libx264", "container": "mp4", "gop": 12, "bframes": 0},
    "h264, one key frame": {"codec": "libx264", "container": "mp4", "gop": 250, "bframes": 2},
    "h264 in matroska": {"codec": "libx264", "container": "matroska", "gop": 12, "bframes": 3},
    "h264 with B frames in avi": {"codec": "libx264", "container": "avi", "gop": 12, "bframes": 3},
    "mpeg4 in avi": {"codec": "mpeg4", "container": "avi", "gop": 12, "bframes": 0},
    "mpeg4 with B frames in avi": {"codec": "mpeg4", "container": "avi", "gop": 12, "bframes": 2},
    "mpeg4 with B frames in mp4": {"codec": "mpeg4", "container": "mp4", "gop": 12, "bframes": 2},
    "hevc": {"codec": "libx265", "container": "mp4", "gop": 12, "bframes": 3},
    "av1": {"codec": "libsvtav1", "container": "mp4", "gop": 12, "bframes": 0},
    "vp9 in webm": {"codec": "libvpx-vp9", "container": "webm", "gop": 12, "bframes": 0},
}
QUICK = [name for name, case in CASES.items() if case["container"] != "avi"]


@pytest.fixture(scope="module")
def encoded(helpers) -> Callable[[str], tuple[bytes, np.ndarray, list[int]]]:  # type: ignore[no-untyped-def]
    """Bytes, all frames and key frames of a case; made once."""
    made: dict[str, tuple[bytes, np.ndarray, list[int]]] = {}
    frames = helpers.moving_frames(FRAMES, 64, 96)

    def get(name: str) -> tuple[bytes, np.ndarray, list[int]]:
        if name not in made:
            if CASES[name]["codec"] not in av.codecs_available:
                pytest.skip(f"this build of PyAV has no encoder {CASES[name]['codec']}")
            data = helpers.encode_video(frames, **CASES[name])
            made[name] = (data, *helpers.decode_all(data))
        return made[name]

    return get


def request_of(
    reference: np.ndarray, keyframes: list[int], wanted: list[int], box: Box | None = None
) -> VideoRequest:
    count, height, width, _ = reference.shape
    return VideoRequest(wanted, count, height, width, keyframes, box)


def decoded(data: bytes, request: VideoRequest, backend: video.Backend = "pyav") -> np.ndarray:
    parts = list(decode_video(data, request, backend))
    assert np.concatenate([indices for indices, _ in parts]).tolist() == list(request.wanted)
    return np.concatenate([frames for _, frames in parts])


def some_requests(count: int) -> list[list[int]]:
    rng = random.Random(0)
    dense = [list(range(start, min(start + 16, count), 2)) for start in (0, 7, 23, count - 9)]
    return [[0], [count - 1], [0, count - 1], list(range(count)), *dense, sorted(rng.sample(range(count), 8))]


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_a_full_decode(name: str, encoded: Callable) -> None:
    data, reference, keyframes = encoded(name)
    assert len(reference) == FRAMES
    for wanted in some_requests(FRAMES):
        np.testing.assert_array_equal(
            decoded(data, request_of(reference, keyframes, wanted)), reference[wanted]
        )


@pytest.mark.parametrize("name", QUICK)
def test_containers_with_times_are_not_decoded_from_the_start(name: str, encoded: Callable) -> None:
    data, reference, keyframes = encoded(name)
    for wanted in some_requests(FRAMES):
        frames = list(video._indexed_decode(data, request_of(reference, keyframes, wanted), wanted))
        assert len(frames) == len(wanted)


def test_stretches_start_at_the_last_key_frame_and_skip_what_nobody_needs() -> None:
    assert video._stretches([5, 7], [0, 12, 24]) == [(0, [5, 7])]
    assert video._stretches([13, 22, 30], [0, 12, 24]) == [(12, [13, 22, 30])]
    assert video._stretches([2, 40], [0, 12, 24, 36]) == [(0, [2]), (36, [40])]
    assert video._stretches([10, 12, 14], [0, 12]) == [(0, [10, 12, 14])]


def test_a_wrong_table_of_key_frames_changes_nothing(encoded: Callable) -> None:
    data, reference, _ = encoded("h264 with B frames")
    wanted = [20, 33, 47]
    for table in ([], [0, 5, 19, 46], [900]):
        np.testing.assert_array_equal(decoded(data, request_of(reference, table, wanted)), reference[wanted])


def test_a_box_is_cut_out_of_each_frame(encoded: Callable) -> None:
    data, reference, keyframes = encoded("h264 with B frames")
    frames = decoded(data, request_of(reference, keyframes, [3, 30], Box(5, 11, 40, 51)))
    np.testing.assert_array_equal(frames, reference[[3, 30], 5:45, 11:62])


def test_chunks_bound_memory(encoded: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    data, reference, keyframes = encoded("h264 with B frames")
    monkeypatch.setattr(video, "_CHUNK_BYTES", 3 * 64 * 96 * 3)
    parts = list(decode_video(data, request_of(reference, keyframes, list(range(10, 20))), "pyav"))
    assert [len(indices) for indices, _ in parts] == [3, 3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([frames for _, frames in parts]), reference[10:20])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"<html>not found</html>",
        lambda data: data[: len(data) // 2],
        lambda data: bytes(1000),
    ],
    ids=["empty", "web page", "half", "zeros"],
)
def test_bytes_that_are_no_video(damage: Callable[[bytes], bytes], encoded: Callable) -> None:
    data, reference, keyframes = encoded("h264 with B frames")
    with pytest.raises(Undecodable):
        decoded(damage(data), request_of(reference, keyframes, [50]))


def test_more_frames_than_there_are(encoded: Callable) -> None:
    data, reference, keyframes = encoded("h264 with B frames")
    with pytest.raises(Undecodable, match="frame 70 of 80 does not come out"):
        decoded(data, VideoRequest([3, 70], 80, 64, 96, keyframes))
    with pytest.raises(Undecodable, match="asked of a video of 60"):
        decoded(data, request_of(reference, keyframes, [60]))


def test_huge_frames_are_refused_before_decoding(encoded: Callable) -> None:
    data, _, _ = encoded("h264 with B frames")
    with pytest.raises(Undecodable, match="at most 8192"):
        decoded(data, VideoRequest([0], FRAMES, 64, 8193))


def test_a_playlist_cannot_open_other_files(tmp_path, encoded: Callable) -> None:  # type: ignore[no-untyped-def]
    data, _, _ = encoded("h264 without")
    (tmp_path / "clip.mp4").write_bytes(data)
    playlists = [
        f"ffconcat version 1.0\nfile '{tmp_path}/clip.mp4'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{tmp_path}/clip.mp4\n#EXT-X-ENDLIST\n",
    ]
    for playlist in playlists:
        with pytest.raises(Undecodable):
            decoded(playlist.encode(), VideoRequest([0], FRAMES, 64, 96))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_video_of_unknown_codec_or_size_is_refused(helpers: Any, container: str) -> None:
    data = helpers.encode_video(helpers.moving_frames(4, 64, 96), container=container)
    unknown = data.replace(b"avc1", b"zzzz").replace(b"V_MPEG4/ISO/AVC", b"V_ZZZZZ/ISO/AVC")
    with pytest.raises(Undecodable, match="codec is not known"):
        decoded(unknown, VideoRequest([0], 4, 64, 96))
    with pytest.raises(NoContainer), open_video(io.BytesIO(b"no video")):
        pass
    with pytest.raises(Undecodable, match="frames of 8193x64 pixels; at most 8192 a side"):
        decoded(data, VideoRequest([0], 4, 64, 8193))


def test_sound_without_pictures() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(Undecodable, match="no video stream"):
        decoded(file.getvalue(), VideoRequest([0], 1, 64, 64))


@pytest.mark.skipif(not torchcodec_works(), reason="torchcodec does not decode on this machine")
@pytest.mark.parametrize("name", CASES)
def test_both_backends_give_the_same_frames(name: str, encoded: Callable) -> None:
    data, reference, keyframes = encoded(name)
    for wanted in some_requests(FRAMES):
        frames = decoded(data, request_of(reference, keyframes, wanted), "torchcodec").astype(np.float32)
        error = ((frames - reference[wanted]) ** 2).mean(axis=(1, 2, 3))
        # Colour conversion may round differently; another frame of these clips is below 25 dB.
        assert (10 * np.log10(255**2 / np.maximum(error, 1e-9)) > 35).all()
