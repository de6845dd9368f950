"""Small real shards: encoded clips and images in tar files, with a manifest."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # for `batches`

from framework.data.manifest import DatasetInfo, Manifest, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.files import hash_file
from framework.recipe.schema import Recipe

settings.register_profile("any machine", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("any machine")


@dataclass
class Medium:
    """One sample to be written into a shard."""

    key: str
    dataset: str
    kind: str
    label: int
    data: bytes
    extension: str
    width: int
    height: int
    frames: int = 1
    fps: float = 0.0
    keyframes: list[int] = field(default_factory=list)


def moving_frames(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames (count, height, width, 3) of a soft pattern that moves, each different from all others."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 8 + 9, width // 8 + 9, 3), dtype=np.uint8)
    size = ((width // 8 + 9) * 8, (height // 8 + 9) * 8)
    field_ = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    frames = [field_[n % 50 : n % 50 + height, (2 * n) % 60 : (2 * n) % 60 + width] for n in range(count)]
    stacked = np.stack(frames)
    for number in range(count):
        stacked[number, :8, : (number * 3) % width + 1] = (number * 7) % 256
    return stacked


def encode_video(
    frames: np.ndarray, *, codec: str = "libx264", container: str = "mp4", gop: int = 12, bframes: int = 2
) -> bytes:
    """An encoded video of RGB frames."""
    file, before = io.BytesIO(), (os.sched_getscheduler(0), os.sched_getparam(0))
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = bframes
        stream.codec_context.thread_count = 1
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        out.mux(stream.encode())
    # SVT-AV1 takes real-time priority where it may: all later tests, and what they start, would have it too.
    os.sched_setscheduler(0, *before)
    return file.getvalue()


def decode_all(data: bytes) -> tuple[np.ndarray, list[int]]:
    """All frames by running through the file, and the indices of key frames: the reference."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [
        index for index, frame in enumerate(frames) if frame.key_frame
    ]


def video_medium(key: str, dataset: str, label: int, data: bytes, extension: str = "mp4") -> Medium:
    frames, keyframes = decode_all(data)
    count, height, width, _ = frames.shape
    return Medium(key, dataset, "video", label, data, extension, width, height, count, 25.0, keyframes)


def image_medium(key: str, dataset: str, label: int, pixels: np.ndarray) -> Medium:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    height, width = pixels.shape[:2]
    return Medium(key, dataset, "image", label, file.getvalue(), "jpg", width, height)


def scan_bomb(side: int = 4000, scans: int = 20_000) -> bytes:
    """A valid progressive JPEG that repeats its last scan: under a megabyte, minutes to decode."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def descendants(depth: int | None = None) -> set[int]:
    """Processes that this one has started, or that those have: all, or those at a depth (1: children)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    level, found = children.get(os.getpid(), []), set()
    number = 1
    while level:
        found |= set(level) if depth in (None, number) else set()
        level, number = [child for pid in level for child in children.get(pid, [])], number + 1
    return found


def write_shards(
    folder: Path, media: Sequence[Medium], classes: dict[str, list[str]], per_shard: int
) -> Path:
    """Tar files of `per_shard` samples and their manifest."""
    folder.mkdir(parents=True)
    names = list(classes)
    rows: list[dict[str, Any]] = []
    shards = []
    for number in range(-(-len(media) // per_shard)):
        part = media[number * per_shard : (number + 1) * per_shard]
        path = folder / f"shard-{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for medium in part:
                for suffix, payload in ((medium.extension, medium.data), ("cls", str(medium.label).encode())):
                    member = tarfile.TarInfo(f"{medium.key}.{suffix}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        for medium in part:
            rows.append(
                {
                    "key": medium.key,
                    "shard": number,
                    "offset": offsets[f"{medium.key}.{medium.extension}"],
                    "length": len(medium.data),
                    "crc32": zlib.crc32(medium.data),
                    "dataset": names.index(medium.dataset),
                    "kind": ("image", "video").index(medium.kind),
                    "label": medium.label,
                    "width": medium.width,
                    "height": medium.height,
                    "frames": medium.frames,
                    "fps": medium.fps,
                    "keyframes": medium.keyframes,
                    "extension": medium.extension,
                }
            )
        shards.append(ShardInfo(path.name, path.stat().st_size, hash_file(path), len(part)))
    kinds = {medium.dataset: medium.kind for medium in media}
    datasets = [
        DatasetInfo(
            name,
            "train",
            kinds[name],  # type: ignore[arg-type]
            tuple(classes[name]),
            sum(medium.dataset == name for medium in media),
        )
        for name in names
    ]
    write_manifest(folder, {name: [row[name] for row in rows] for name in rows[0]}, shards, datasets)
    return folder


def mixed_media(videos: int = 10, images: int = 14) -> list[Medium]:
    """Clips of 20 frames and images of differing sizes, interleaved."""
    clips = [
        video_medium(f"moves/{n:03d}", "moves", n % 3, encode_video(moving_frames(20, 48, 64, n), gop=6))
        for n in range(videos)
    ]
    pictures = [
        image_medium(f"stills/{n:03d}", "stills", n % 4, moving_frames(1, 40 + n, 56, 100 + n)[0])
        for n in range(images)
    ]
    media: list[Medium] = []
    for number in range(max(videos, images)):
        media += clips[number : number + 1] + pictures[number : number + 1]
    return media


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """The functions of this file, for tests that make their own data."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def media() -> list[Medium]:
    return mixed_media()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, media: list[Medium]) -> Path:
    """Mixed shards; tests that damage them make their own copy."""
    classes = {"moves": ["left", "right", "up"], "stills": ["a", "b", "c", "d"]}
    return write_shards(tmp_path_factory.mktemp("data") / "shards", media, classes, per_shard=5)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """A recipe over mixed shards; keyword arguments go into its `data`, `train` and sources."""

    def make(
        folder: Path,
        *,
        mixture: dict[str, int] | None = None,
        data: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        video: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
    ) -> Recipe:
        augment = {"randaugment": {"layers": 1, "magnitude": 5}}
        shared = {"path": str(folder), "size": 32, "augment": augment}
        moves = {**shared, "kind": "video", "classes": 3, "clip": {"frames": 4, "stride": 2}, **(video or {})}
        stills = {**shared, "kind": "image", "classes": 4, **(image or {})}
        return Recipe.model_validate(
            {
                "name": "test",
                "seed": 5,
                "model": {"name": "tubevit_ti"},
                "data": {
                    "sources": {"moves": moves, "stills": stills},
                    "mixture": mixture or {"moves": 4, "stills": 8},
                    "block": 4,
                    "workers": 0,
                    **(data or {}),
                },
                "optimizer": {"lr": 0.001},
                "train": {"steps": 10, **(train or {})},
            }
        )

    return make


@pytest.fixture
def flip_byte() -> Callable[[Path, Manifest, int], None]:
    """Change one bit in the middle of a sample's media bytes, and nothing else."""

    def flip(folder: Path, manifest: Manifest, index: int) -> None:
        sample = manifest.sample(index)
        with (folder / sample.shard).open("r+b") as file:
            file.seek(sample.offset + sample.length // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    return flip


@pytest.fixture(scope="session")
def flaky() -> ModuleType:
    """The servers of `flaky_server.py`."""
    spec = importlib.util.spec_from_file_location("flaky_server", Path(__file__).with_name("flaky_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flaky_server"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def damaged(shards: Path, tmp_path: Path, flip_byte: Callable) -> Path:
    """Shards with one flipped byte, in the clip of index 6."""
    folder = Path(shutil.copytree(shards, tmp_path / "damaged"))
    manifest = Manifest.open(folder)
    flip_byte(folder, manifest, int(manifest.select("moves", "moves", "video")[6]))
    return folder


@pytest.fixture
def no_worker_is_left_behind(helpers: Any) -> Iterator[None]:
    before = helpers.descendants()
    yield
    gc.collect()
    assert helpers.descendants() <= before
