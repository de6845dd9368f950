"""Media made on the spot, and the command line as a user meets it."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
from PIL import Image
from typer.testing import CliRunner

from launch.cli import app


def encode_video(
    frames: int = 20,
    *,
    size: tuple[int, int] = (64, 48),
    fps: int = 10,
    gop: int = 8,
    container: str = "mp4",
    codec: str = "libx264",
    audio: bool = False,
    video: bool = True,
    seed: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A film of moving noise: (frames, height, width), optionally with a tone, optionally only that."""
    random = numpy.random.default_rng(seed)
    picture = random.integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
    settings = {"g": str(gop), "bf": "0"} if codec == "libx264" else {}
    # a file and not a buffer: to put its index in front, the muxer reads what it has written
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=container, options=options or {}) as output,
    ):
        streams: list[Any] = []
        if video:
            stream = output.add_stream(codec, rate=Fraction(fps), options=settings)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.codec_context.thread_count = 1
            streams.append(stream)
        if audio:
            streams.append(output.add_stream("aac", rate=16000, layout="mono"))
        if video:
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(numpy.roll(picture, 3 * number, axis=1), format="rgb24")
                output.mux(streams[0].encode(frame))
            output.mux(streams[0].encode())
        if audio:
            tone = numpy.zeros((1, 16000), numpy.float32)
            sound = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            sound.sample_rate = 16000
            output.mux(streams[-1].encode(sound))
            output.mux(streams[-1].encode())
        output.close()
        return Path(file.name).read_bytes()


def encode_image(size: tuple[int, int] = (40, 30), form: str = "JPEG", seed: int = 0) -> bytes:
    """Noise as a picture of the given (width, height)."""
    random = numpy.random.default_rng(seed)
    pixels = random.integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@dataclass(frozen=True)
class Output:
    """What a command printed, and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def tubeworks() -> Callable[..., Output]:
    """Run `tubeworks data …` in this process; with one worker, for speed, if nothing else is said."""

    def run(*arguments: str | Path | int) -> Output:
        words = ["data", *map(str, arguments)]
        if words[1] in ("shard", "synth", "verify") and not {"--workers", "merge"} & set(words):
            words += ["--workers", "1"]
        result = CliRunner().invoke(app, words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Output(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def make_video() -> Callable[..., bytes]:
    return encode_video


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture
def kinetics(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write a Kinetics download: files by name, and the rows of the list."""

    def write(files: dict[str, bytes], rows: Sequence[str], head: str = "") -> tuple[Path, Path]:
        videos = tmp_path / "videos"
        for name, data in files.items():
            path = videos / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        annotations = tmp_path / "list.csv"
        head = head or "label,youtube_id,time_start,time_end,split"
        annotations.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
        return videos, annotations

    return write


@pytest.fixture
def class_folders(tmp_path: Path) -> Callable[..., Path]:
    """Write a tree of class folders from {relative name: bytes}."""

    def write(files: dict[str, bytes], root: str = "folders") -> Path:
        for name, data in files.items():
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / root

    return write


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """All files of a folder of shards, byte for byte."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
