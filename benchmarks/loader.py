"""Clips per second and core from shards: this loader, stock webdataset, and a bare decode loop as the limit.

    python -m benchmarks.loader [--clips 2] [--rounds 40] [--many 10000] [--out FILE]

Makes its own data: 720p sources of 10 s, sharded with each preset by `tubeworks data shard`. Every contender
makes the same thing, 32 frames with stride 2 from a random place, a random crop of 224x224, in one thread of
one process. Contenders take turns of a few clips, this loader and the bare loop with the same clips, and what
counts is processor time, so that other work on the machine slows all of them alike. "In a data worker" is
this loader with one worker, whose processor time counts with that of the process which takes its clips.
Memory is that of a fresh process, for itself alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import psutil
import torch
import webdataset
from PIL import Image

from benchmarks.machine import describe_machine
from framework.data.augment import random_box, resize
from framework.data.clips import random_clip
from framework.data.loader import training_batches
from framework.data.manifest import Manifest
from framework.data.nursery import worker_memory
from framework.data.randomness import Draws, sample_seed
from framework.data.sources import build_plan, open_sources
from framework.data.video import VideoRequest, decode_video
from framework.recipe.schema import Augment, Clip, Recipe
from framework.world import World

COUNT, RATE, SIZE = 300, 30, (1280, 720)
CLIP = Clip(frames=32, stride=2)
AUGMENT = Augment()
PRESETS = ("archive", "balanced", "fast")
PLANNED = 4096
REPEATS = (1, 2, 4)
Clips = Iterator[np.ndarray]


def film(seed: int, size: tuple[int, int], count: int) -> bytes:
    """A film of a soft pattern under a moving camera, with a patch of noise that crosses it."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 12, width // 12, 3), dtype=np.uint8)
    pattern = np.asarray(
        Image.fromarray(coarse).resize((width + 200, height + 200), Image.Resampling.BICUBIC)
    )
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            top, left = (int(100 + 90 * f(number / 45)) for f in (np.cos, np.sin))
            frame = pattern[top : top + height, left : left + width].copy()
            column, side = number * 5 % (width - width // 8), width // 8
            frame[side : 2 * side, column : column + side] = rng.integers(0, 255, (side, side, 3))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def make_shards(folder: Path, films: Sequence[bytes], presets: Sequence[str]) -> None:
    """Class folders of the films, and shards of them with each preset."""
    source = folder / "films" / "one"
    source.mkdir(parents=True)
    for number, data in enumerate(films):
        (source / f"{number:03d}.mp4").write_bytes(data)
    for preset in presets:
        command = [sys.executable, "-m", "launch.cli", "data", "shard", "folder", "--workers", "1"]
        command += ["--input", str(source.parent), "--name", "clips", "--preset", preset]
        subprocess.run([*command, "--out", str(folder / preset)], check=True, stdout=subprocess.DEVNULL)


def recipe_of(folder: Path, repeats: int = 1, clips: int = 1_000_000, workers: int = 0) -> Recipe:
    """One video a step from the shards of a folder, with so many views of it."""
    source = {
        "path": str(folder),
        "kind": "video",
        "classes": 1,
        "clip": CLIP.model_dump(),
        "repeats": repeats,
    }
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"name": "tubevit_ti"},
            "data": {"sources": {"clips": source}, "mixture": {"clips": repeats}, "workers": workers},
            "optimizer": {"lr": 0.001},
            "train": {"steps": clips},
        }
    )


def product(folder: Path, repeats: int = 1, clips: int = 1_000_000, workers: int = 0) -> Clips:
    """This loader: plan, checksum, decode, crop, flip, batch."""
    recipe = recipe_of(folder, repeats, clips, workers)
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    batches = training_batches(recipe, sources, plan, World(), start_step=0, stop_step=clips)
    for batch in batches:
        yield batch.groups["clips"].pixels.numpy()


def stock_webdataset(folder: Path) -> Clips:
    """What is usual: webdataset's own reader, PyAV from the start of the file to the last wanted frame."""
    total = int(Manifest.open(folder).column("frames").min())
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    reader = cast(Any, webdataset).WebDataset  # it fills its namespace when it is imported
    stream = reader(shards, shardshuffle=False, empty_check=False).to_tuple("mp4").repeat()
    for number, (data,) in enumerate(stream):
        draws = Draws(number, "benchmark")
        yield crop(sequential(data, random_clip(CLIP, total, RATE, draws)), draws)


def sequential(data: bytes, wanted: Sequence[int]) -> np.ndarray:
    """The wanted frames, decoded from the start."""
    frames, chosen = [], set(wanted)
    with av.open(io.BytesIO(data)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                frames.append(frame.to_ndarray(format="rgb24"))
            if index >= wanted[-1]:
                break
    return np.stack(frames)


def crop(frames: np.ndarray, draws: Draws) -> np.ndarray:
    """A random crop of frames, 224x224."""
    box = random_box(draws, frames.shape[1], frames.shape[2], AUGMENT)
    part = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return resize(np.ascontiguousarray(part), 224)


def bare_loop(folder: Path) -> Clips:
    """The limit: this project's decoder and crop on files in memory, and nothing else.

    It makes the very clips of `product`, in its order, all decided before the first one; it flips none.
    """
    files, requests = planned(folder)
    for place, request in itertools.cycle(requests):
        yield np.concatenate([resize(chunk, 224) for _, chunk in decode_video(files[place], request)])


def planned(folder: Path) -> tuple[list[bytes], list[tuple[int, VideoRequest]]]:
    """All files, and what the first steps take from which."""
    recipe = recipe_of(folder)
    sources = open_sources(recipe)
    plan, manifest = build_plan(recipe, sources), sources["clips"].manifest
    infos = [manifest.sample(int(index)) for index in sources["clips"].selection]
    requests = []
    for step in range(PLANNED):
        ids = plan.share(step, rank=0, world=1, micro=0, accumulation=1)["clips"]
        place = int(ids.index[0])
        info, seed = infos[place], sample_seed(recipe.seed, "clips", int(ids.epoch[0]), place, 0)
        wanted = random_clip(CLIP, info.frames, info.fps, Draws(seed, "clip"))
        box = random_box(Draws(seed, "crop"), info.height, info.width, AUGMENT)
        keys = info.keyframes.tolist()
        requests.append((place, VideoRequest(wanted, info.frames, info.height, info.width, keys, box)))
    return [films_in(folder, info) for info in infos], requests


def films_in(folder: Path, info: Any) -> bytes:
    """The bytes of one sample."""
    with (folder / info.shard).open("rb") as file:
        file.seek(info.offset)
        return file.read(info.length)


def processor_time(clips: Clips, count: int) -> float:
    """Processor seconds per clip."""
    started = time.process_time()
    for _ in range(count):
        next(clips)
    return (time.process_time() - started) / count


def memory_of(make: Callable[[], Clips], count: int, looks: int) -> list[float]:
    """MB that a fresh process has for itself, at `looks` points on its way through `count` clips."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_report_memory, args=(theirs, make, count, looks)
    )
    process.start()
    theirs.close()
    found = [ours.recv() for _ in range(looks)]
    process.join()
    return found


def _report_memory(pipe: Any, make: Callable[[], Clips], count: int, looks: int) -> None:
    torch.set_num_threads(1)
    clips = make()
    for _ in range(looks):
        for _ in range(count // looks):
            next(clips)
        pipe.send(round(worker_memory() / 1e6, 1))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, _, upper = statistics.quantiles(values, n=4)
    return {
        "median": round(statistics.median(values), 4),
        "lower_quartile": round(lower, 4),
        "upper_quartile": round(upper, 4),
    }


def compare(folder: Path, clips: int, rounds: int) -> dict[str, Any]:
    """Clips per second and core of all contenders, and the ratios that are goals, round by round."""
    makers: dict[str, Callable[[], Clips]] = {
        "webdataset and PyAV, archive": lambda: stock_webdataset(folder / "archive")
    }
    for preset in PRESETS:
        makers[f"bare loop, {preset}"] = lambda preset=preset: bare_loop(folder / preset)
        makers[f"tubeworks, {preset}"] = lambda preset=preset: product(folder / preset)
    running = {name: make() for name, make in makers.items()}
    for contender in running.values():
        processor_time(contender, 2)
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        names = list(running) if number % 2 == 0 else list(running)[::-1]
        for name in names:
            times[name].append(processor_time(running[name], clips))
    ratios = {
        f"of the limit, {preset}": [
            bare / ours
            for bare, ours in zip(times[f"bare loop, {preset}"], times[f"tubeworks, {preset}"], strict=True)
        ]
        for preset in PRESETS
    }
    ratios["tubeworks fast / webdataset raw 720p"] = [
        stock / ours
        for stock, ours in zip(times["webdataset and PyAV, archive"], times["tubeworks, fast"], strict=True)
    ]
    return {
        "clips_per_second_and_core": {
            name: spread([1 / one for one in found]) for name, found in times.items()
        },
        "ratios": {name: spread(found) for name, found in ratios.items()},
        "memory_mb_per_process": {name: memory_of(make, 20, 1)[0] for name, make in makers.items()},
        "bytes_per_clip": {
            preset: round(float(np.mean(Manifest.open(folder / preset).column("length"))))
            for preset in PRESETS
        },
    }


def repeated(folder: Path, clips: int, rounds: int) -> dict[str, dict[str, float]]:
    """Processor milliseconds of a view, by how many views of a video are made at once."""
    running = {repeats: product(folder, repeats) for repeats in REPEATS}
    times: dict[int, list[float]] = {repeats: [] for repeats in REPEATS}
    for videos in running.values():
        processor_time(videos, 2)
    for _ in range(rounds):
        for repeats, videos in running.items():
            times[repeats].append(processor_time(videos, clips) / repeats * 1e3)
    return {str(repeats): spread(found) for repeats, found in times.items()}


def in_a_data_worker(folder: Path, rounds: int, clips: int = 10) -> dict[str, Any]:
    """Processor milliseconds of a clip that a worker makes, and the bare loop's beside it."""
    limit, made = bare_loop(folder), product(folder, workers=1)
    processor_time(limit, 2)
    next(made)
    workers = [child for child in psutil.Process().children(recursive=True) if not child.children()]
    found: dict[str, list[float]] = {"bare loop": [], "tubeworks": []}
    for _ in range(rounds):
        found["bare loop"].append(processor_time(limit, clips) * 1e3)
        before = time_when_idle(workers)
        own = processor_time(made, clips)
        found["tubeworks"].append((own + (time_when_idle(workers) - before) / clips) * 1e3)
    ratios = [bare / ours for bare, ours in zip(found["bare loop"], found["tubeworks"], strict=True)]
    return {**{name: spread(values) for name, values in found.items()}, "of the limit": spread(ratios)}


def time_when_idle(workers: Sequence[psutil.Process]) -> float:
    """Processor seconds of workers so far, once they have made what they were asked for ahead of time."""

    def spent() -> float:
        return sum(int(Path(f"/proc/{one.pid}/schedstat").read_text().split()[0]) for one in workers) / 1e9

    before = spent()
    while True:
        time.sleep(0.3)
        if (now := spent()) == before:
            return now
        before = now


def others() -> dict[str, str]:
    """Whether the other loaders that people use can be imported here, and if not, why."""
    found = {}
    for name, module in {"Megatron-Energon": "megatron.energon", "MosaicML Streaming": "streaming"}.items():
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        found[name] = "installed, not timed by this script" if there else "not installed"
    return found


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2, help="Clips of a contender in a round.")
    parser.add_argument("--films", type=int, default=4, help="Different 720p sources.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--many", type=int, default=10_000, help="Small clips in one process, for its memory."
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_shards(folder / "large", [film(seed, SIZE, COUNT) for seed in range(arguments.films)], PRESETS)
        result: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.loader", *sys.argv[1:]]),
            "machine": describe_machine(),
            "versions": {
                "av": av.__version__,
                "torch": torch.__version__,
                "webdataset": webdataset.__version__,
            },
            "clip": "32 frames, stride 2, of 10 s at 1280x720 and 30 frames/s; random crop to 224x224",
            **compare(folder / "large", arguments.clips, arguments.rounds),
            "ms_of_a_view_by_repeats": repeated(folder / "large" / "fast", arguments.clips, arguments.rounds),
            "ms_in_a_data_worker": {
                preset: in_a_data_worker(folder / "large" / preset, max(4, arguments.rounds // 3))
                for preset in PRESETS
            },
            "others": others(),
        }
        print(json.dumps(result, indent=1), flush=True)
        if arguments.many:
            make_shards(folder / "small", [film(seed, (128, 96), 72) for seed in range(64)], ["fast"])
            looks = memory_of(lambda: product(folder / "small" / "fast"), arguments.many, 10)
            result["memory_mb_over_clips"] = {
                "clips": arguments.many,
                "film": "128x96, 72 frames",
                "at_each_tenth": looks,
            }
        result["load_at_end"] = round(os.getloadavg()[0], 1)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(cast(str, text) + "\n")


if __name__ == "__main__":
    main()
