"""Clips per second and core from shards: this loader, those that people use, and a bare loop as the limit.

    python -m benchmarks.loader [--clips 2] [--rounds 24] [--many 10000] [--others PYTHON] [--out FILE]

Makes its own data: 720p sources of 10 s, sharded with each preset by `tubeworks data shard`. Every contender
makes the same thing, 32 frames with stride 2 from a random place, a random crop of 224x224, in one thread of
one process. Contenders take turns of a few clips, and what counts is processor time, so that other work on
the machine slows all of them alike. "Of the limit" is apart, because it asks for a few per cent: this loader
and the bare loop make the same clips in turns of one, many times, and the interval of 90 % is that of the
median, by drawing the turns again with replacement. "In a data worker" is this loader with one worker, in
batches of one and of eight, in turns of 16 clips; the processor time of the worker counts with that of the
process which takes its clips.
Memory is that of a fresh process, for itself alone. Stock webdataset always takes part; Megatron-Energon and
MosaicML Streaming, which need another torch, where `--others` names an interpreter that has them. How those
two read and decode stands in benchmarks.other_loaders.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
import webdataset

from benchmarks.contenders import (
    COUNT,
    OTHERS,
    PRESETS,
    SIZE,
    Clips,
    OtherLoader,
    bare_loop,
    film,
    make_shards,
    other_versions,
    prepare_other,
    product,
    stock_webdataset,
)
from benchmarks.machine import describe_machine
from framework.data.manifest import Manifest
from framework.data.nursery import worker_memory

REPEATS = (1, 2, 4)
BATCHES = (1, 8)
CLIPS_OF_A_WORKER = 16
PAIRS = {"archive": 4, "balanced": 10, "fast": 30}
"""Clips of this loader and of the bare loop for each round of the others: as much time for each preset."""
DRAWN = 2000
STOCK = "webdataset and PyAV"
Turn = Callable[[int], float]


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


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, and an interval of 90 % for the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(DRAWN))
    interval = [round(medians[int(part * DRAWN)], 4) for part in (0.05, 0.95)]
    return {**spread(values), "interval_of_the_median": interval, "turns": len(values)}


def contenders(folder: Path) -> dict[str, Callable[[], Clips]]:
    """What runs in this process, by name and preset."""
    makers: dict[str, Callable[[], Clips]] = {}
    for preset in PRESETS:
        makers[f"{STOCK}, {preset}"] = partial(stock_webdataset, folder / preset)
        makers[f"bare loop, {preset}"] = partial(bare_loop, folder / preset)
        makers[f"tubeworks, {preset}"] = partial(product, folder / preset)
    return makers


def prepare_others(python: Path, folder: Path) -> dict[str, Callable[[], OtherLoader]]:
    """What runs in another environment, by name and preset, with data sets made of the same shards."""
    openers: dict[str, Callable[[], OtherLoader]] = {}
    for name in OTHERS:
        for preset in PRESETS:
            own = folder / "others" / name / preset
            prepare_other(python, name, folder / preset, own)
            openers[f"{name}, {preset}"] = partial(OtherLoader, python, name, own)
    return openers


def take_turns(turns: Mapping[str, Turn], clips: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds per clip of all contenders, round by round."""
    for turn in turns.values():
        turn(max(2, clips))
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns) if number % 2 == 0 else list(turns)[::-1]:
            times[name].append(turns[name](clips))
    return times


def ratios_of(times: Mapping[str, list[float]], rivals: Sequence[str]) -> dict[str, list[float]]:
    """How many times as fast this loader is as its rivals, round by round."""

    def ratio(other: str, ours: str) -> list[float]:
        return [theirs / own for theirs, own in zip(times[other], times[ours], strict=True)]

    ratios = {"tubeworks fast / webdataset raw 720p": ratio(f"{STOCK}, archive", "tubeworks, fast")}
    for name in rivals:
        for one in PRESETS:
            ratios[f"tubeworks / {name}, {one}"] = ratio(f"{name}, {one}", f"tubeworks, {one}")
    return ratios


def compare(folder: Path, clips: int, rounds: int, python: Path | None) -> dict[str, Any]:
    """Clips per second and core of all contenders, their ratios, and their memory."""
    makers = contenders(folder)
    openers = prepare_others(python, folder) if python else {}
    with contextlib.ExitStack() as stack:
        turns: dict[str, Turn] = {name: partial(processor_time, make()) for name, make in makers.items()}
        for name, open_other in openers.items():
            turns[name] = stack.enter_context(open_other()).processor_time
        times = take_turns(turns, clips, rounds)
    ratios = ratios_of(times, [STOCK, *OTHERS] if python else [STOCK])
    return {
        "clips_per_second_and_core": {
            name: spread([1 / one for one in found]) for name, found in times.items()
        },
        "ratios": {name: spread(found) for name, found in ratios.items()},
        "memory_mb_per_process": {
            **{name: memory_of(make, 20, 1)[0] for name, make in makers.items()},
            **{name: other_memory(open_other, 20) for name, open_other in openers.items()},
        },
        "bytes_per_clip": {
            preset: round(float(np.mean(Manifest.open(folder / preset).column("length"))))
            for preset in PRESETS
        },
    }


def other_memory(open_other: Callable[[], OtherLoader], count: int) -> float:
    """MB that a fresh process of another environment has for itself after so many clips."""
    with open_other() as other:
        return other.memory(count)


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


def of_the_limit(folder: Path, pairs: int) -> dict[str, Any]:
    """The bare loop's time by this loader's, clip by clip, both in one thread of this process."""
    limit, ours = bare_loop(folder), product(folder)
    times = take_turns(
        {"bare": partial(processor_time, limit), "ours": partial(processor_time, ours)}, 1, pairs
    )
    return estimate([bare / own for bare, own in zip(times["bare"], times["ours"], strict=True)])


def in_a_data_worker(folder: Path, batch: int, pairs: int) -> dict[str, Any]:
    """Processor milliseconds of a clip that a worker makes, in batches, and the bare loop's beside it."""
    limit, made = bare_loop(folder), product(folder, workers=1, batch=batch)
    next(made)
    workers = [child for child in psutil.Process().children(recursive=True) if not child.children()]

    def ours(clips: int) -> float:
        before = time_when_idle(workers)
        own = processor_time(made, clips // batch) / batch
        return own + (time_when_idle(workers) - before) / clips

    turns = {"bare loop": partial(processor_time, limit), "tubeworks": ours}
    times = take_turns(turns, CLIPS_OF_A_WORKER, pairs)
    ratios = [bare / own for bare, own in zip(times["bare loop"], times["tubeworks"], strict=True)]
    milliseconds = {name: spread([1e3 * one for one in found]) for name, found in times.items()}
    return {**milliseconds, "of the limit": estimate(ratios)}


def in_data_workers(folder: Path, turns: int) -> dict[str, Any]:
    """`in_a_data_worker` by the size of batches."""
    return {f"batches of {batch}": in_a_data_worker(folder, batch, turns) for batch in BATCHES}


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


def others(python: Path | None) -> dict[str, str]:
    """What the other loaders that people use were timed with, or that they were not."""
    return other_versions(python) if python else dict.fromkeys(OTHERS, "not timed: give --others")


def main() -> None:
    """Measure, print, and write where asked."""
    arguments = parse()
    timed = others(arguments.others)  # first, because it may end here
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards, rounds = folder / "large", arguments.rounds
        make_shards(shards, [film(seed, SIZE, COUNT) for seed in range(arguments.films)], PRESETS)
        result: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.loader", *sys.argv[1:]]),
            "machine": describe_machine(),
            "versions": {
                "av": av.__version__,
                "torch": torch.__version__,
                "webdataset": webdataset.__version__,
            },
            "clip": "32 frames, stride 2, of 10 s at 1280x720 and 30 frames/s; random crop to 224x224",
            **compare(shards, arguments.clips, rounds, arguments.others),
            "of_the_limit": {one: of_the_limit(shards / one, rounds * PAIRS[one]) for one in PRESETS},
            "ms_in_a_data_worker": {
                one: in_data_workers(shards / one, max(2, rounds * PAIRS[one] // 12)) for one in PRESETS
            },
            "ms_of_a_view_by_repeats": repeated(shards / "fast", arguments.clips, rounds),
            "others": timed,
        }
        print(json.dumps(result, indent=1), flush=True)
        if arguments.many:
            result["memory_mb_over_clips"] = over_many(folder / "small", arguments.many)
        result["load_at_end"] = round(os.getloadavg()[0], 1)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def parse() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2, help="Clips of a contender in a round.")
    parser.add_argument("--films", type=int, default=4, help="Different 720p sources.")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--many", type=int, default=10_000, help="Small clips in one process, for its memory."
    )
    parser.add_argument(
        "--others",
        type=Path,
        metavar="PYTHON",
        help="Interpreter of an environment with Megatron-Energon and MosaicML Streaming, "
        "`make other-loaders` makes one.",
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, there is no spread of one")
    return arguments


def over_many(folder: Path, clips: int) -> dict[str, Any]:
    """Memory of one process at each tenth of its way through many small clips."""
    make_shards(folder, [film(seed, (128, 96), 72) for seed in range(64)], ["fast"])
    looks = memory_of(lambda: product(folder / "fast"), clips, 10)
    return {"clips": clips, "film": "128x96, 72 frames", "at_each_tenth": looks}


if __name__ == "__main__":
    main()
