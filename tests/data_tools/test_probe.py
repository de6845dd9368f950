"""Probing decodes everything: true numbers for good files, and a reason for each bad one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import av
import pytest
from av.codec.codec import UnknownCodecError
from PIL import Image

from data_tools.presets import PRESETS
from data_tools.probe import probe
from data_tools.readers import FileReader, Unusable
from data_tools.synth import MotionClip
from data_tools.transcode import transcode_video
from framework.data.limits import MAX_IMAGE_PIXELS
from framework.data.manifest import Kind
from framework.errors import DataError


def test_a_video_is_described_by_what_decodes(make_video: Callable[..., bytes]) -> None:
    media = probe(make_video(20, size=(64, 48), fps=10, gop=8), "video", "mp4")
    assert (media.width, media.height, media.frames, media.extension) == (64, 48, 20, "mp4")
    assert media.fps == pytest.approx(10)
    assert media.keyframes == (0, 8, 16)


@pytest.mark.parametrize(
    ("container", "codec"), [("matroska", "libx264"), ("avi", "mpeg4"), ("mov", "libx264")]
)
def test_containers_and_codecs(make_video: Callable[..., bytes], container: str, codec: str) -> None:
    media = probe(make_video(25, container=container, codec=codec), "video", "x")
    assert media.frames == 25
    assert media.fps == pytest.approx(10, rel=0.01)


def test_sound_beside_the_video_does_not_matter(make_video: Callable[..., bytes]) -> None:
    assert probe(make_video(5, audio=True), "video", "mp4").frames == 5
    # the tone is a second long, the film half a second: that is no truncation
    assert probe(make_video(5, audio=True, container="matroska"), "video", "mkv").frames == 5


@pytest.mark.parametrize(
    ("container", "codec", "suffix"),
    [("mp4", "libx264", "mp4"), ("matroska", "libx264", "mkv"), ("avi", "mpeg4", "avi")],
)
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_truncated_video_is_found_at_any_place(
    make_video: Callable[..., bytes], container: str, codec: str, suffix: str, share: float
) -> None:
    data = make_video(75, container=container, codec=codec, gop=250)
    assert probe(data, "video", suffix).frames == 75
    with pytest.raises(Unusable, match="truncated"):
        probe(data[: int(len(data) * share)], "video", suffix)


def test_a_truncated_video_with_its_index_in_front_says_how_much_is_left(
    make_video: Callable[..., bytes],
) -> None:
    data = make_video(75, options={"movflags": "faststart"})
    assert data.index(b"moov") < data.index(b"mdat")
    with pytest.raises(Unusable, match=r"truncated.*\d+ of 75 frames decode"):
        probe(data[: int(len(data) * 0.9)], "video", "mp4")


def test_a_frame_or_two_less_than_claimed_is_tolerated(make_video: Callable[..., bytes]) -> None:
    data = bytearray(make_video(100, container="avi", codec="mpeg4"))
    place = data.index(b"strh") + 8 + 32  # dwLength of the stream: frames that it claims to have
    claimed = int.from_bytes(data[place : place + 4], "little")
    assert claimed == 100
    data[place : place + 4] = (102).to_bytes(4, "little")
    assert probe(bytes(data), "video", "avi").frames == 100
    data[place : place + 4] = (110).to_bytes(4, "little")
    with pytest.raises(Unusable, match="truncated: 100 of 110 frames decode"):
        probe(bytes(data), "video", "avi")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"<!DOCTYPE html><html>Not found</html>", "not media: a web page instead of a video"),
        (b"\n  <html><body>429</body></html>", "not media: a web page instead of a video"),
        (b"random text that is no film at all", "not media"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(40), "truncated or damaged: an mp4 file"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", "not media"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not media"),
    ],
)
def test_what_is_no_video_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        probe(data, "video", "mp4")


def test_sound_alone_is_no_video(make_video: Callable[..., bytes]) -> None:
    with pytest.raises(Unusable, match="no video in it \\(audio only\\)"):
        probe(make_video(video=False, audio=True), "video", "mp4")


def test_a_codec_that_nothing_decodes_is_said(make_video: Callable[..., bytes]) -> None:
    with pytest.raises(Unusable, match="codec is not known"):
        probe(make_video(5).replace(b"avc1", b"zzzz"), "video", "mp4")


class Writing:
    """A file to be written, in the place of PyAV's, to which no stream can be added."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_stream(self, *_: object, **__: object) -> None:
        raise self._error


@pytest.fixture
def encoder_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Let adding a stream to a new file raise an error; reading goes on as ever."""
    really = av.open

    def use(error: Exception) -> None:
        def instead(file: Any, mode: str = "r", **options: Any) -> Any:
            return Writing(error) if mode == "w" else really(file, "r", **options)

        monkeypatch.setattr(av, "open", instead)

    return use


def test_without_an_encoder_no_video_is_called_damaged(
    make_video: Callable[..., bytes], encoder_fails: Callable[[Exception], None], tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").write_bytes(make_video(5))
    encoder_fails(UnknownCodecError("libx264"))
    with pytest.raises(DataError, match=r"no H.264 encoder .* install the wheel") as caught:
        transcode_video(FileReader.of(tmp_path / "a.mp4"), PRESETS["fast"])
    assert not isinstance(caught.value, Unusable)  # which would only leave out this one file
    with pytest.raises(DataError, match=r"no H.264 encoder .* install the wheel"):
        MotionClip(bytes(64), 32, 4, (0, 0), (1, 0)).read()


def test_frames_that_the_encoder_refuses_are_not_called_truncated(
    make_video: Callable[..., bytes], encoder_fails: Callable[[Exception], None], tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").write_bytes(make_video(5))
    encoder_fails(ValueError("odd colours"))
    with pytest.raises(Unusable, match=r"^decodes, but .* cannot be encoded as H\.264: odd colours"):
        transcode_video(FileReader.of(tmp_path / "a.mp4"), PRESETS["fast"])


def test_an_image_is_no_video(make_image: Callable[..., bytes]) -> None:
    with pytest.raises(Unusable, match="an image instead of a video"):
        probe(make_image(), "video", "mp4")


@pytest.mark.parametrize(
    ("form", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp")]
)
def test_images_are_named_by_what_they_are(make_image: Callable[..., bytes], form: str, suffix: str) -> None:
    media = probe(make_image((40, 30), form), "image", "jpeg")  # ImageNet has a PNG that is called .JPEG
    assert (media.width, media.height, media.frames, media.fps, media.keyframes) == (40, 30, 1, 0.0, ())
    assert media.extension == suffix


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_truncated_image_is_found(make_image: Callable[..., bytes], form: str) -> None:
    data = make_image((200, 200), form)
    with pytest.raises(Unusable, match="truncated"):
        probe(data[: len(data) * 9 // 10], "image", "jpg")


def test_an_image_that_unpacks_to_too_much_is_refused_before_it_is_unpacked() -> None:
    side = int(MAX_IMAGE_PIXELS**0.5) + 1
    for width, height in ((side, side), (20000, 20000)):
        buffer = io.BytesIO()
        Image.new("1", (width, height)).save(buffer, "PNG")
        with pytest.raises(Unusable, match="too large"):
            probe(buffer.getvalue(), "image", "png")


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi", "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damage_of_any_kind_is_refused_or_decodes(
    make_video: Callable[..., bytes], make_image: Callable[..., bytes], form: str
) -> None:
    """Random damage never ends in anything but a description or a reason."""
    kind: Kind = "video" if form.islower() else "image"
    data = make_video(8, container=form, codec="mpeg4") if kind == "video" else make_image(form=form)
    random = Random(form)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(random.choice((1, 3, 20))):
            damaged[random.randrange(min(len(data), random.choice((64, 10**9))))] = random.randrange(256)
        if random.random() < 0.3:
            del damaged[random.randrange(len(damaged)) :]
        try:
            media = probe(bytes(damaged), kind, "x")
        except Unusable:
            refused += 1
        else:
            assert media.frames > 0
            assert media.width > 0
            assert media.height > 0
    assert refused > 5
