"""The commands `tubeworks data shard …`: one per layout of the input, and the steps of a large run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, List, Optional  # noqa: UP035 - evaluated by typer on 3.10

import typer

from data_tools.cli_options import AsJson, Workers, grouped, print_json
from data_tools.cli_output import (
    Annotations,
    Classes,
    KindName,
    Name,
    Output,
    Overwrite,
    Split,
    Videos,
    kind_of,
    make,
    print_report,
)
from framework.wording import counted

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Turn videos and images into shards with a manifest.")

PlannedOut = Annotated[Path, typer.Argument(metavar="OUT", help="The --out of the plan.")]
Input = Annotated[Path, typer.Option("--input", help="Folder, or a tar archive and a path in it.")]


@app.command()
@grouped
def kinetics(
    videos: Videos,
    annotations: Annotations,
    split: Split,
    output: Output,
    name: Name = "k400",
    classes: Classes = None,
) -> None:
    """Kinetics-400, -600, -700: clips YOUTUBEID_START_END, flat or in class folders; list as CSV or JSON."""
    from data_tools.importers.classes import read_classes
    from data_tools.importers.kinetics import collect_kinetics

    given = read_classes(classes, name, "video") if classes else None
    make([collect_kinetics(videos, annotations, name, split=split, classes=given)], output)


@app.command("ssv2")
@grouped
def something(
    videos: Videos,
    annotations: Annotations,
    output: Output,
    split: Split = "train",
    name: Name = "ssv2",
    classes: Classes = None,
) -> None:
    """Something-Something v2: ID.webm and the JSON lists; --classes takes labels.json."""
    from data_tools.importers.classes import read_classes
    from data_tools.importers.something import collect_something

    given = read_classes(classes, name, "video") if classes else None
    make([collect_something(videos, annotations, name, split=split, classes=given)], output)


@app.command()
@grouped
def charades(
    videos: Videos,
    annotations: Annotations,
    classes: Annotated[Path, typer.Option("--classes", help="Charades_v1_classes.txt.")],
    output: Output,
    split: Split = "train",
    name: Name = "charades",
    segments: Annotated[
        bool, typer.Option("--segments", help="A clip for each action, not a sample for each video.")
    ] = False,
) -> None:
    """Charades: multi-label videos, or a clip for each of their actions (with a --preset that encodes)."""
    from data_tools.importers.charades import collect_charades

    collection = collect_charades(videos, annotations, name, split=split, classes=classes, segments=segments)
    make([collection], output)


@app.command()
@grouped
def epic(
    videos: Videos,
    annotations: Annotations,
    verbs: Annotated[Path, typer.Option("--verbs", help="EPIC_100_verb_classes.csv.")],
    nouns: Annotated[Path, typer.Option("--nouns", help="EPIC_100_noun_classes.csv.")],
    output: Output,
    split: Split = "train",
    name: Name = "epic",
) -> None:
    """EPIC-Kitchens-100: a clip for each segment, with verb and noun; needs a --preset that encodes."""
    from data_tools.importers.epic import collect_epic

    make([collect_epic(videos, annotations, name, split=split, verbs=verbs, nouns=nouns)], output)


@app.command()
@grouped
def moments(
    videos: Videos,
    annotations: Annotations,
    output: Output,
    split: Split = "train",
    name: Name = "moments",
    classes: Classes = None,
) -> None:
    """Moments in Time: videos in class folders and their list; --classes takes moments_categories.txt."""
    from data_tools.importers.classes import read_classes
    from data_tools.importers.moments import collect_moments

    given = read_classes(classes, name, "video") if classes else None
    make([collect_moments(videos, annotations, name, split=split, classes=given)], output)


@app.command()
@grouped
def imagenet(
    source: Input,
    output: Output,
    split: Split = "train",
    name: Name = "in1k",
    labels: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--labels", help="Classes of flat images: LOC_val_solution.csv, text, or the devkit."),
    ] = None,
    classes: Classes = None,
) -> None:
    """ImageNet-1k and -21k: folders of synsets or the original tar archives, which are read in place."""
    from data_tools.importers.classes import read_classes
    from data_tools.importers.imagenet import collect_imagenet

    given = read_classes(classes, name, "image") if classes else None
    make([collect_imagenet(source, name, split=split, labels=labels, classes=given)], output)


@app.command()
@grouped
def folder(
    inputs: Annotated[
        List[Path],  # noqa: UP006
        typer.Option("--input", help="Folder with class folders, or a tar archive and a path in it."),
    ],
    output: Output,
    names: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Option("--name", help="Name of the data set: one for each --input, or one for all."),
    ] = None,
    split: Split = "train",
    kind: KindName = None,
    classes: Classes = None,
) -> None:
    """Any class folders of images or videos; several inputs give mixed shards.

    Inputs of the same name become one data set.
    """
    from data_tools.importers.folder import collect_folder, default_name

    if names and len(names) not in (1, len(inputs)):
        raise typer.BadParameter(
            f"{len(names)} --name for {len(inputs)} --input: give one for each, or one for all"
        )
    chosen = [default_name(path) for path in inputs] if not names else names * (len(inputs) // len(names))
    collections = [
        collect_folder(path, name, split=split, kind=kind_of(kind), classes_from=classes)
        for path, name in zip(inputs, chosen, strict=True)
    ]
    make(collections, output)


@dataclass(frozen=True)
class Columns:
    """Which column of a table says what."""

    path: Annotated[str, typer.Option("--path-column", help="Place of the file below --root.")] = "path"
    labels: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Option("--label-column", help="The class; given several times, each is a head of its own."),
    ] = None
    separator: Annotated[
        str, typer.Option("--label-separator", help="Parts the labels of a sample: multi-label.")
    ] = ""
    splits: Annotated[str, typer.Option("--split-column", help="Only rows that say --split.")] = ""
    start: Annotated[str, typer.Option("--start-column", help="Start of a segment in seconds.")] = ""
    end: Annotated[str, typer.Option("--end-column", help="Its end; frames from there on are left out.")] = ""
    key: Annotated[str, typer.Option("--key-column", help="Names samples, instead of their path.")] = ""


@app.command()
@grouped
def table(
    source: Annotated[Path, typer.Option("--table", help="CSV, TSV or Parquet, with names of columns.")],
    root: Annotated[Path, typer.Option("--root", help="Folder or tar archive that paths are relative to.")],
    name: Name,
    columns: Columns,
    output: Output,
    split: Split = "train",
    kind: KindName = None,
    classes: Annotated[
        Optional[List[Path]],  # noqa: UP006, UP045
        typer.Option("--classes", help="Order of classes, one for each --label-column."),
    ] = None,
) -> None:
    """Any CSV or Parquet file that names files, with one label, several, or none, and segments of videos."""
    from data_tools.importers.classes import read_classes
    from data_tools.importers.table import TableColumns, collect_table

    chosen = kind_of(kind)
    layout = TableColumns(
        columns.path, tuple(columns.labels or ()), columns.separator, columns.splits, columns.start,
        columns.end, columns.key,
    )  # fmt: skip
    given = [read_classes(path, name, chosen or "video") for path in classes or ()]
    collection = collect_table(source, root, name, columns=layout, split=split, kind=chosen, classes=given)
    make([collection], output)


@app.command()
@grouped
def mix(
    inputs: Annotated[
        List[str],  # noqa: UP006
        typer.Option(
            "--input",
            metavar="NAME=FORM:OPTION=VALUE,…",
            help="One input, see above; may be given several times.",
        ),
    ],
    output: Output,
) -> None:
    """Several inputs, videos and images, as one set of mixed shards.

    An input is NAME=kinetics:videos=DIR,annotations=CSV,split=S
    or NAME=folder:input=DIR, with more options after commas: classes=FILE for
    both; split=S and kind=image|video for a folder. DIR may be a tar archive
    with a path in it, as in set.tar/train.
    """
    from data_tools.importers.mix import collect_input

    make([collect_input(text) for text in inputs], output)


@app.command()
def run(
    out: PlannedOut,
    task: Annotated[int, typer.Option("--task", min=0, help="Which share, counted from 0.")] = 0,
    of: Annotated[int, typer.Option("--of", min=1, help="How many shares there are.")] = 1,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Make a share of the shards that were planned with --plan-only; what is there already is kept.

    Shares may be made at the same time on any machines that see the folder.
    """
    from data_tools.pool import available_cores
    from data_tools.sharding import make_shards

    count, made = make_shards(out, task, of, workers or available_cores())
    if as_json:
        print_json({"task": task, "of": of, "shards": count, "made": made})
    else:
        typer.echo(f"share {task} of {of}: {counted(count, 'shard')}, {made} made now")


@app.command()
def merge(out: PlannedOut, overwrite: Overwrite = False, as_json: AsJson = False) -> None:
    """Join the shards of a plan, once all are made, to the folder OUT with its manifest."""
    from data_tools.sharding import merge_shards

    print_report(merge_shards(out, overwrite=overwrite), as_json)
