"""What it costs to read shards: bytes and processor time of a sample, memory, and cores for one GPU.

A sample is what training makes of it: read, checksum, decode, crop, resize, augment, on one thread. The
figures are processor time, so other work on the machine disturbs them little.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import psutil

from data_tools.items import Collection, Entry, inventory
from data_tools.presets import PRESETS, Preset
from data_tools.readers import MemberReader
from data_tools.report import human_bytes
from data_tools.sharding import ShardOptions, shard
from framework.data.datasets import DatasetInfo
from framework.data.manifest import Manifest
from framework.data.randomness import sample_seed
from framework.data.samples import SampleReader
from framework.data.sources import OpenSource
from framework.errors import DataError
from framework.recipe.schema import Clip, Recipe, Source

__all__ = ["BenchOptions", "bench_shards", "bench_text"]


_CLIP = Clip(frames=32, stride=2)
"""How videos are measured where no recipe says it."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured; without a recipe clips are 32 frames, every second one, of 224 pixels.

    A GPU takes `samples_per_second`, or what the recipe's model lets `hardware` do.
    """

    folder: str | Path
    recipe: Recipe | None = None
    presets: bool = False
    samples: int = 48
    samples_per_second: float | None = None
    hardware: str = "h200"


@dataclass
class _Row:
    """The measurement of one data set."""

    folder: str
    dataset: str
    preset: str
    kind: str
    samples: int
    bytes_per_sample: float
    cpu_ms: float
    cpu_ms_spread: tuple[float, float]
    memory_mb: float
    growth_mb: float
    cores_per_gpu: float | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)


def bench_shards(options: BenchOptions) -> dict[str, Any]:
    """Measure some samples of every data set; plain values, ready for JSON.

    Raises DataError for a folder that is no shards, and where the recipe has no source like a data set.
    """
    rates, assumption = _rates(options)
    rows: list[_Row] = []
    manifest = Manifest.open(options.folder)
    for dataset in manifest.datasets:
        if not dataset.samples:
            continue
        source = _source(options.recipe, dataset, options.folder)
        rows.append(_measure(manifest, dataset, source, options.samples, "as it is"))
        if options.presets:
            rows.extend(_by_presets(manifest, dataset, source, options.samples))
    for row in rows:
        rate = rates.get(row.dataset, rates.get(""))
        row.cores_per_gpu = None if rate is None else round(rate * row.cpu_ms / 1000, 2)
    if options.recipe is None:
        clips = f"clips of {_CLIP.frames} frames with stride {_CLIP.stride}"
        assumption += f"\nmeasured as crops of 224 pixels, videos as {clips}; a RECIPE says its own"
    return {"assumption": assumption, "rows": [_plain(row) for row in rows]}


def _plain(row: _Row) -> dict[str, Any]:
    content = dict(vars(row))
    content["clips_per_second_per_core"] = round(1000 / row.cpu_ms, 1) if row.cpu_ms else None
    return content


def _rates(options: BenchOptions) -> tuple[dict[str, float], str]:
    """Samples a second that one GPU takes, by source (`""`: of any), and how that number was come by."""
    if options.samples_per_second is not None:
        return {"": options.samples_per_second}, f"one GPU takes {options.samples_per_second:g} samples/s"
    if options.recipe is None:
        return {}, "no recipe and no --samples-per-second: cores for a GPU are not known"
    from framework.forecast.forecast import Surroundings, forecast
    from framework.forecast.hardware import find_hardware

    hardware = find_hardware(options.hardware)
    seconds = forecast(options.recipe, hardware, Surroundings(1, 1))["times"]["compute"]
    mixture = options.recipe.data.samples
    rates = {name: count / seconds for name, count in mixture.items()}
    for name, source in options.recipe.data.sources.items():
        if name in rates and source.dataset:
            rates[source.dataset] = rates[name]
    listing = ", ".join(f"{rates[name]:.1f} {name}" for name in mixture)
    return rates, (
        f"one {options.hardware} takes {listing} samples/s of {options.recipe.name} (forecast of its"
        " computing time alone: `tubeworks describe --hardware`)"
    )


def _source(recipe: Recipe | None, dataset: DatasetInfo, folder: str | Path) -> Source:
    """How the samples of a data set become tensors."""
    if recipe is None:
        clip = _CLIP if dataset.kind == "video" else None
        known = {"path": str(folder), "kind": dataset.kind, "classes": max(1, len(dataset.classes))}
        return Source.model_validate({**known, "clip": clip})
    of_kind = {name: s for name, s in recipe.data.sources.items() if s.media == dataset.kind}
    for name, source in of_kind.items():
        if dataset.name in (name, source.dataset) or len(of_kind) == 1:
            return source
    raise DataError(f"recipe {recipe.name}: no source of {dataset.kind}s is like data set {dataset.name!r}")


def _measure(manifest: Manifest, dataset: DatasetInfo, source: Source, samples: int, preset: str) -> _Row:
    number = manifest.datasets.index(dataset)
    selection = numpy.flatnonzero(manifest.column("dataset") == number).astype(numpy.int64)
    opened = OpenSource(dataset.name, source, manifest, dataset, selection)
    reader = SampleReader(opened)
    count = min(samples, len(selection))
    chosen = numpy.linspace(0, len(selection) - 1, count).astype(int).tolist()
    process = psutil.Process(os.getpid())

    def make(index: int) -> None:
        seeds = [sample_seed(0, dataset.name, 0, index, view) for view in range(source.repeats)]
        reader.training_views(reader.info(index), seeds)

    make(chosen[0])  # opens, imports, warms
    before = process.memory_info().rss
    stages = dict(reader.seconds)
    times = []
    for index in chosen:
        started = time.process_time()
        make(index)
        times.append(1000 * (time.process_time() - started))
    after = process.memory_info().rss
    low, high = numpy.percentile(times, (10, 90)).tolist()
    return _Row(
        str(manifest.folder), dataset.name, preset, dataset.kind, count,
        float(manifest.column("length")[selection].mean()), round(float(numpy.mean(times)), 2),
        (round(low, 2), round(high, 2)), round(after / 1e6, 1), round((after - before) / 1e6, 1),
        stages_ms={
            stage: round(1000 * (seconds - stages[stage]) / count, 2)
            for stage, seconds in reader.seconds.items()
        },
    )  # fmt: skip


def _by_presets(manifest: Manifest, dataset: DatasetInfo, source: Source, samples: int) -> Iterator[_Row]:
    """The same samples as each preset that encodes would store them."""
    for preset in PRESETS.values():
        if preset.keeps_bytes:
            continue
        with tempfile.TemporaryDirectory(prefix="tubeworks-bench-") as folder:
            out = Path(folder) / preset.name
            started = time.process_time()
            _encode(manifest, dataset, samples, preset, out)
            spent = 1000 * (time.process_time() - started)
            encoded = Manifest.open(out)
            row = _measure(encoded, encoded.datasets[0], source, samples, preset.name)
            row.folder = str(manifest.folder)
            row.stages_ms["encoding, once"] = round(spent / row.samples, 1)
            yield row


def _encode(manifest: Manifest, dataset: DatasetInfo, samples: int, preset: Preset, out: Path) -> None:
    number = manifest.datasets.index(dataset)
    places = numpy.flatnonzero(manifest.column("dataset") == number)
    chosen = places[numpy.linspace(0, len(places) - 1, min(samples, len(places))).astype(int)]
    entries = []
    for place in chosen.tolist():
        info = manifest.sample(place)
        reader = MemberReader(str(manifest.shard_path(info.shard)), 0, info.offset, info.length)
        entries.append(Entry(f"{place}.{info.extension}", str(place), None, reader))
    collection = Collection(dataset.name, dataset.split, dataset.kind, (), entries)
    shard(inventory([collection]), ShardOptions(out, preset=preset))


def bench_text(result: dict[str, Any]) -> str:
    """The measurements as a table for people."""
    heads = (
        "data set",
        "as",
        "a sample",
        "CPU ms (10-90 %)",
        "a second and core",
        "memory",
        "cores for a GPU",
    )
    rows: list[Sequence[str]] = [heads]
    for row in result["rows"]:
        low, high = row["cpu_ms_spread"]
        cores = "?" if row["cores_per_gpu"] is None else f"{row['cores_per_gpu']:.1f}"
        rows.append(
            (
                row["dataset"], row["preset"], human_bytes(row["bytes_per_sample"]),
                f"{row['cpu_ms']:.1f} ({low:.1f}-{high:.1f})", f"{row['clips_per_second_per_core']}",
                f"{row['memory_mb']:.0f} MB (+{max(0.0, row['growth_mb']):.0f})", cores,
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), result["assumption"]])
