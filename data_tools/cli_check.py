"""`tubeworks data verify`, `index`, `bench` and `export-ffcv`: shards as they are, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from data_tools.cli_options import AsJson, Folder, Workers, print_json
from data_tools.cli_output import Classes, Name, Split, kind_of, print_report
from framework.errors import DataError
from framework.wording import counted

__all__ = ["bench", "export_ffcv", "index", "verify"]


def verify(
    folder: Folder,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every sample as well.")] = False,
    classes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--classes", help="Official list of classes to compare with."),
    ] = None,
    official: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--official", help="Official list of samples: what share of it is there."),
    ] = None,
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--dataset", help="Data set that is compared, where there are several."),
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Compare every byte of a folder of shards with its manifest, and the samples with official lists."""
    from data_tools.pool import available_cores
    from data_tools.verify import Official
    from data_tools.verify import verify as verify_shards

    lists = Official(classes, official, dataset) if classes or official else None
    report = verify_shards(folder, decode=decode, workers=workers or available_cores(), official=lists)
    if as_json:
        print_json(report.content())
    elif report.is_unreadable:
        raise DataError(report.problems[0].problem)
    else:
        typer.echo(report.to_text())
    if report.problems:
        raise typer.Exit(DataError.exit_code)


def index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of WebDataset shards.")],
    name: Name,
    kind: Annotated[str, typer.Option("--kind", help="image or video.")],
    split: Split = "train",
    label_from: Annotated[str, typer.Option("--label-from", help="cls, json:FIELD, or none.")] = "cls",
    classes: Classes = None,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a manifest that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Index shards that others made (img2dataset, video2dataset) where they lie; no shard is written."""
    from data_tools.importers.classes import read_classes
    from data_tools.indexing import IndexOptions, index_shards
    from data_tools.pool import available_cores

    chosen = kind_of(kind) or "image"
    names = read_classes(classes, name, chosen) if classes else ()
    options = IndexOptions(
        folder, name, chosen, split, label_from, names, workers or available_cores(), overwrite
    )
    print_report(index_shards(options), as_json)


def bench(
    folder: Folder,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="RECIPE", help="Its clips, sizes and model; else 32 frames of 224 pixels."),
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="Also encode these samples by each preset, and measure that.")
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Samples to measure, of each data set.")
    ] = 48,
    samples_per_second: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--samples-per-second", min=0, help="What one GPU takes; else the recipe's forecast."),
    ] = None,
    hardware: Annotated[str, typer.Option("--hardware", help="The GPU of the forecast.")] = "h200",
    as_json: AsJson = False,
) -> None:
    """What shards cost to read: bytes, CPU time, memory, and the cores that keep one GPU busy."""
    from data_tools.bench import BenchOptions, bench_shards, bench_text
    from framework.recipe import load_recipe

    loaded = load_recipe(recipe, []).recipe if recipe else None
    options = BenchOptions(folder, loaded, presets, samples, samples_per_second, hardware)
    result = bench_shards(options)
    if as_json:
        print_json(result)
    else:
        typer.echo(bench_text(result))


def export_ffcv(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="The .beton file.")],
    dataset: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--dataset", help="Data set of images, where there are several."),
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="raw keeps pixels, jpg is small.")] = "raw",
    quality: Annotated[int, typer.Option("--quality", min=1, max=100, help="Of jpg.")] = 92,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a data set of images as an FFCV file, which a source of a recipe names as `beton`."""
    from data_tools.export_ffcv import ExportOptions
    from data_tools.export_ffcv import export_ffcv as export
    from data_tools.pool import available_cores

    if mode not in ("raw", "jpg"):
        raise typer.BadParameter(f"--mode is raw or jpg, not {mode}")
    result = export(
        ExportOptions(folder, out, dataset, mode, quality, workers or available_cores(), overwrite)
    )
    if as_json:
        print_json(result)
    else:
        typer.echo(
            f"{result['out']}: {counted(result['samples'], 'image')}, {result['bytes'] / 1e6:.1f} MB ({mode})"
        )
