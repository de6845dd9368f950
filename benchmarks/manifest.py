"""What it costs to open a manifest of many samples, in time and in memory of a worker's own.

python -m benchmarks.manifest --out benchmarks/results/manifest.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from benchmarks.machine import describe_machine
from framework.data.manifest import SAMPLES_NAME, DatasetInfo, Manifest, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.data.plan import Plan
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.files import hash_file
from framework.recipe.schema import Recipe

SHARD_SAMPLES = 1000
LENGTH = 200_000


def make(folder: Path, samples: int, *, mixed: bool) -> None:
    """Sparse shards and a manifest of clips (and, if `mixed`, of as many pictures between them)."""
    numbers = numpy.arange(samples, dtype=numpy.int64)
    count = -(-samples // SHARD_SAMPLES)
    shards = []
    for number in range(count):
        path = folder / f"shard-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(SHARD_SAMPLES * LENGTH)
        held = min(SHARD_SAMPLES, samples - number * SHARD_SAMPLES)
        shards.append(ShardInfo(path.name, SHARD_SAMPLES * LENGTH, "0" * 32, held))
    dataset = (numbers % 2 if mixed else numbers * 0).astype(numpy.uint16)
    video = dataset == 0
    keys = numpy.char.add("k400/sample-", numpy.char.zfill(numbers.astype("U10"), 10)).tolist()
    frames = numpy.where(video, 300, 1).astype(numpy.uint32)
    keyframe_counts = numpy.where(video, 8, 0)
    edges = numpy.concatenate([[0], numpy.cumsum(keyframe_counts)])
    keyframes = pyarrow.LargeListArray.from_arrays(
        pyarrow.array(edges), pyarrow.array(numpy.arange(edges[-1], dtype=numpy.uint32) % 8 * 32)
    )
    columns: dict[str, Any] = {
        "key": pyarrow.array(keys, pyarrow.large_string()),
        "shard": (numbers // SHARD_SAMPLES).astype(numpy.uint32),
        "offset": (numbers % SHARD_SAMPLES * LENGTH).astype(numpy.uint64),
        "length": numpy.full(samples, LENGTH - 1024, numpy.uint64),
        "crc32": numbers.astype(numpy.uint32),
        "dataset": dataset,
        "kind": video.astype(numpy.uint8),
        "label": (numbers % 400).astype(numpy.int32),
        "width": numpy.full(samples, 340, numpy.uint32),
        "height": numpy.full(samples, 256, numpy.uint32),
        "frames": frames,
        "fps": numpy.where(video, 30, 0).astype(numpy.float32),
        "keyframes": keyframes,
        "extension": pyarrow.array(numpy.where(video, "mp4", "jpg").tolist(), pyarrow.large_string()),
    }
    classes = tuple(f"class {number}" for number in range(400))
    clips = int(video.sum())
    datasets = [DatasetInfo("k400", "train", "video", classes, clips)]
    if mixed:
        datasets.append(DatasetInfo("in1k", "train", "image", classes, samples - clips))
    write_manifest(folder, columns, shards, datasets)


def recipe(folder: Path, *, mixed: bool) -> Recipe:
    """A recipe over such shards."""
    clips = {"path": str(folder), "kind": "video", "classes": 400, "clip": {"frames": 16, "fps": 8}}
    pictures = {"path": str(folder), "kind": "image", "classes": 400}
    return Recipe.model_validate(
        {
            "name": "manifest",
            "model": {"name": "tubevit_ti"},
            "data": {
                "sources": {"k400": clips, **({"in1k": pictures} if mixed else {})},
                "mixture": {"k400": 256, **({"in1k": 512} if mixed else {})},
            },
            "optimizer": {"lr": 0.001},
            "train": {"steps": 10},
        }
    )


def own_memory() -> int:
    """Bytes that this process alone has: what its end would give back."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    own = ("Private_Clean", "Private_Dirty")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(own))


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock, and of the processor: on a busy machine they differ."""
    began = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}


def measure(folder: Path, mixed: bool, touched: int, report: Any) -> None:
    """In a process of its own: open, plan, and read the entries of samples all over the table."""
    before = own_memory()
    settings = recipe(folder, mixed=mixed)
    opened = timed(lambda: Manifest.open(folder))
    began = time.perf_counter(), time.process_time()
    sources = open_sources(settings)
    ready = {"wall": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}
    plan = build_plan(settings, sources)
    first_step = timed(lambda: plan.step(0))
    after = own_memory()
    rng = numpy.random.default_rng(0)
    seconds = list(entries_read(sources, rng, touched))
    first, rest = seconds[:1000], seconds[-1000:]
    report.send(
        {
            "open_s": opened,
            "sources_s": ready,
            "first_step_s": first_step,
            "own_mb": (after - before) / 1e6,
            "worker_own_mb": memory_of_a_worker(sources, plan, rng, touched),
            "samples_ms": {
                "mean": 1e3 * statistics.fmean(first),
                "worst": 1e3 * max(seconds),
                "later_mean": 1e3 * statistics.fmean(rest),
            },
        }
    )


def entries_read(
    sources: Mapping[str, OpenSource], rng: numpy.random.Generator, touched: int
) -> Iterator[float]:
    """Read the entries of so many samples, drawn from all sources; processor seconds of each."""
    for name, source in sources.items():
        for index in rng.integers(0, len(source), touched // len(sources)).tolist():
            start = time.process_time()
            assert source.manifest.sample(int(source.selection[index])).dataset == name
            yield time.process_time() - start


def memory_of_a_worker(
    sources: Mapping[str, OpenSource], plan: Plan, rng: numpy.random.Generator, touched: int
) -> float:
    """Megabytes that a data worker, forked after the sources were opened, comes to have for itself."""
    mine, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    if os.fork() == 0:
        start = own_memory()
        for _ in entries_read(sources, rng, touched):
            pass
        for step in range(50):
            plan.share(step, rank=3, world=8, micro=0, accumulation=1)
        theirs.send((own_memory() - start) / 1e6)
        os._exit(0)
    found = mine.recv()
    os.wait()
    return found


def measured(folder: Path, mixed: bool, touched: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(folder, mixed, touched, theirs))
    process.start()
    result = mine.recv()
    process.join()
    return result


def main() -> None:
    """Print the figures as JSON, and write them where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--touched", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the shards; by default a temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.manifest",
        "machine": describe_machine(),
        "samples": arguments.samples,
    }
    for mixed in (False, True):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            make(folder, arguments.samples, mixed=mixed)
            began = time.perf_counter()
            hash_file(folder / SAMPLES_NAME)
            results["mixed" if mixed else "single"] = {
                "shards": -(-arguments.samples // SHARD_SAMPLES),
                "table_mb": (folder / SAMPLES_NAME).stat().st_size / 1e6,
                "manifest_mb": (folder / "manifest.json").stat().st_size / 1e6,
                "hash_of_whole_table_s": time.perf_counter() - began,
                "runs": [measured(folder, mixed, arguments.touched) for _ in range(arguments.repeats)],
            }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
