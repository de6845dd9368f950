"""Processor time from shard to pixels, per clip and stage, for videos encoded in different ways.

    python -m benchmarks.decode [--clips 24] [--out benchmarks/results/decode.md]

Makes its own data: clips of 10 s at 340x256 with moving content. Times are of one process with one thread.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from framework.data.loader import training_batches
from framework.data.manifest import DatasetInfo, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.data.sources import build_plan, open_sources
from framework.data.video import Backend, Box, VideoRequest, decode_video
from framework.data.video_torchcodec import torchcodec_works
from framework.files import hash_file
from framework.recipe.schema import Recipe
from framework.world import World

HEIGHT, WIDTH, COUNT, RATE = 256, 340, 300, 30
ENCODINGS: dict[str, dict[str, str]] = {
    "x264 default (GOP 250)": {"g": "250"},
    "x264, GOP 32": {"g": "32"},
    "x264, GOP 16, no B frames, fastdecode": {"g": "16", "bf": "0", "tune": "fastdecode"},
}


def pictures(seed: int) -> Iterator[np.ndarray]:
    """Frames of a soft pattern under a moving camera, and a patch of noise that crosses it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (60, 70, 3), dtype=np.uint8)
    pattern = np.asarray(Image.fromarray(coarse).resize((1120, 960), Image.Resampling.BICUBIC))
    for number in range(COUNT):
        top, left = (int(150 + 140 * f(number / 45)) for f in (np.cos, np.sin))
        frame = pattern[top : top + HEIGHT, left : left + WIDTH].copy()
        column = number * 3 % (WIDTH - 40)
        frame[20:60, column : column + 40] = rng.integers(0, 255, (40, 40, 3))
        yield frame


def encode(seed: int, options: dict[str, str]) -> bytes:
    """One mp4 file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in pictures(seed):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def keyframes(data: bytes) -> list[int]:
    """Indices of the key frames."""
    with av.open(io.BytesIO(data)) as container:
        return [index for index, frame in enumerate(container.decode(video=0)) if frame.key_frame]


def write(folder: Path, clips: list[bytes]) -> None:
    """One shard with its manifest."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, data in enumerate(clips):
            member = tarfile.TarInfo(f"clip/{number:03d}.mp4")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        offsets = [member.offset_data for member in tar]
    count = len(clips)
    columns = {
        "key": [f"clip/{number:03d}" for number in range(count)],
        "offset": offsets,
        "length": [len(data) for data in clips],
        "crc32": [zlib.crc32(data) for data in clips],
        "keyframes": [keyframes(data) for data in clips],
        "extension": ["mp4"] * count,
    }
    same = {
        "shard": 0,
        "dataset": 0,
        "kind": 1,
        "label": 0,
        "width": WIDTH,
        "height": HEIGHT,
        "frames": COUNT,
    }
    columns |= {name: [value] * count for name, value in {**same, "fps": float(RATE)}.items()}
    shard = ShardInfo(path.name, path.stat().st_size, hash_file(path), count)
    write_manifest(folder, columns, [shard], [DatasetInfo("clip", "train", "video", ("one",), count)])


def recipe_for(folder: Path, randaugment: bool) -> Recipe:
    """32 frames with stride 2, crops of 224, one clip a step."""
    augment = {"randaugment": {"layers": 2, "magnitude": 10}} if randaugment else {}
    source = {
        "path": str(folder),
        "kind": "video",
        "classes": 1,
        "size": 224,
        "clip": {"frames": 32, "stride": 2},
        "augment": augment,
    }
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"name": "tubevit_ti"},
            "data": {"sources": {"clip": source}, "mixture": {"clip": 1}, "workers": 0},
            "optimizer": {"lr": 0.001},
            "train": {"steps": 1},
        }
    )


def stages(folder: Path, clips: int, randaugment: bool) -> tuple[dict[str, float], float]:
    """Time per stage, and the processor's milliseconds per clip altogether."""
    recipe = recipe_for(folder, randaugment)
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    batches = training_batches(recipe, sources, plan, World(), start_step=0, stop_step=clips + 2)
    for _ in range(2):
        next(batches)
    started = time.process_time()
    made = list(batches)
    total = (time.process_time() - started) / clips * 1e3
    return {name: statistics.mean(b.seconds[name] for b in made) for name in made[0].seconds}, total


def decode_times(data: bytes, dense: bool, repeats: int) -> dict[Backend, float]:
    """Median processor milliseconds per clip and backend: 32 frames with stride 2, or 16 spread evenly."""
    rng = np.random.default_rng(0)
    keys, times = keyframes(data), {"pyav": [], "torchcodec": []}
    backends: list[Backend] = ["pyav", "torchcodec"] if torchcodec_works() else ["pyav"]
    for _ in range(repeats):
        start = int(rng.integers(COUNT - 63))
        wanted = list(range(start, start + 64, 2)) if dense else list(range(start % 18, COUNT, 18))[:16]
        request = VideoRequest(wanted, COUNT, HEIGHT, WIDTH, keys, Box(20, 30, 200, 220))
        for backend in backends:
            times[backend].append(
                measured(lambda b=backend, r=request: sum(1 for _ in decode_video(data, r, b)))
            )
    return {backend: statistics.median(times[backend]) for backend in backends}


def measured(work: Callable[[], object]) -> float:
    """Processor milliseconds."""
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1e3


def report(clips: int) -> str:
    """The whole measurement as Markdown."""
    lines = [
        "# From shard to pixels: processor milliseconds per clip",
        "",
        "`python -m benchmarks.decode`: 10 s clips at 340x256, 30 frames a second; one process, one thread.",
        f"{machine()}, PyAV {av.__version__}, torch {torch.__version__}.",
        f"Load average at the start: {os.getloadavg()[0]:.1f}.",
        "",
        "A training sample is 32 frames with stride 2, a random crop resized to 224x224, and a flip; stages",
        "are shares of its time. The last column: with RandAugment (2 layers, magnitude 10) besides.",
        "",
        "| encoding | kB | ms | clips/s/core | read | verify | decode | resize | RandAugment: ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    decoders = [
        "",
        "Decoding alone, to RGB: PyAV (starts at key frames, skips what nobody needs) and torchcodec.",
        "",
        "| encoding | 32 frames, stride 2: PyAV | torchcodec | 16 frames over the video: PyAV | torchcodec |",
        "|---|---|---|---|---|",
    ]
    for name, options in ENCODINGS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            videos = [encode(seed, options) for seed in range(4)]
            write(folder, videos)
            parts, total = stages(folder, clips, randaugment=False)
            augmented = stages(folder, clips, randaugment=True)[1]
        size = statistics.mean(map(len, videos)) / 1e3
        whole = sum(parts.values())
        cells = [f"{parts[stage] / whole:.0%}" for stage in ("read", "verify", "decode", "augment")]
        speed = f"{size:.0f} | {total:.1f} | {1e3 / total:.0f}"
        lines.append(f"| {name} | {speed} | {' | '.join(cells)} | {augmented:.1f} |")
        row = [decode_times(videos[0], dense, clips) for dense in (True, False)]
        shown = [f"{times[b]:.1f}" if b in times else "–" for times in row for b in ("pyav", "torchcodec")]
        decoders.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines + decoders) + "\n"


def machine() -> str:
    """Processor and number of cores."""
    names = {
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return f"{', '.join(sorted(names)) or platform.processor()} ({os.cpu_count()} cores)"


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = report(arguments.clips)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
