"""The commands `tubeworks data shard …`: one per layout of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, List, Optional  # noqa: UP035 - evaluated by typer on 3.10

import typer

from data_tools.cli_options import AsJson, Seed, Workers, grouped, print_json
from framework.errors import DataError

if TYPE_CHECKING:
    from data_tools.items import Collection
    from data_tools.report import ShardReport

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Turn videos and images into shards with a manifest.")

Split = Annotated[str, typer.Option("--split", help="Which split these samples are.")]
Classes = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--classes", help="Order of classes: a text file, one a line, or shards made before."),
]
Kind = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--kind", help="image or video, where both are there."),
]


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")]
PlannedOut = Annotated[Path, typer.Argument(metavar="OUT", help="The --out of the plan.")]


@dataclass(frozen=True)
class Output:
    """Where shards go and how they are cut."""

    out: Annotated[Path, typer.Option("--out", help="Folder for the shards; it must not exist yet.")]
    workers: Workers = None
    seed: Seed = 0
    shard_samples: Annotated[
        int, typer.Option("--shard-samples", min=1, help="A shard has at most so many.")
    ] = 4096
    shard_mb: Annotated[int, typer.Option("--shard-mb", min=1, help="A shard ends at so many MiB.")] = 256
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            help="archive keeps every byte; balanced and fast encode anew (fast:short_side=320,fps=15).",
        ),
    ] = "archive"
    overwrite: Overwrite = False
    plan_only: Annotated[
        bool,
        typer.Option("--plan-only", help="Only plan; `shard run` makes the shards, `shard merge` ends it."),
    ] = False
    as_json: AsJson = False


@app.command()
@grouped
def kinetics(
    videos: Annotated[Path, typer.Option("--videos", help="Folder of clips, flat or in class folders.")],
    annotations: Annotated[Path, typer.Option("--annotations", help="Official CSV list.")],
    split: Annotated[str, typer.Option("--split", help="Split of the list: train, val or test.")],
    output: Output,
    name: Annotated[str, typer.Option("--name", help="Name of the data set.")] = "k400",
    classes: Classes = None,
) -> None:
    """Shard clips named by an official Kinetics list; missing and damaged files are reported and left out."""
    from data_tools.importers.classes import read_classes
    from data_tools.importers.kinetics import collect_kinetics

    given = read_classes(classes, name, "video") if classes else None
    _shard([collect_kinetics(videos, annotations, name, split=split, classes=given)], output)


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
    kind: Kind = None,
    classes: Classes = None,
) -> None:
    """Shard class folders of images or videos; several inputs give mixed shards.

    Inputs of the same name become one data set.
    """
    from data_tools.importers.folder import collect_folder, default_name

    if kind not in (None, "image", "video"):
        raise typer.BadParameter(f"--kind is image or video, not {kind}")
    if names and len(names) not in (1, len(inputs)):
        raise typer.BadParameter(
            f"{len(names)} --name for {len(inputs)} --input: give one for each, or one for all"
        )
    chosen = [default_name(path) for path in inputs] if not names else names * (len(inputs) // len(names))
    collections = [
        collect_folder(path, name, split=split, kind=kind, classes_from=classes)
        for path, name in zip(inputs, chosen, strict=True)
    ]
    _shard(collections, output)


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
    """Shard several inputs, videos and images, into one set of mixed shards.

    An input is NAME=kinetics:videos=DIR,annotations=CSV,split=S
    or NAME=folder:input=DIR, with more options after commas: classes=FILE for
    both; split=S and kind=image|video for a folder. DIR may be a tar archive
    with a path in it, as in set.tar/train.
    """
    from data_tools.importers.mix import collect_input

    _shard([collect_input(text) for text in inputs], output)


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
        typer.echo(f"share {task} of {of}: {count} shards, {made} made now")


@app.command()
def merge(out: PlannedOut, overwrite: Overwrite = False, as_json: AsJson = False) -> None:
    """Join the shards of a plan, once all are made, to the folder OUT with its manifest."""
    from data_tools.sharding import merge_shards

    _print_report(merge_shards(out, overwrite=overwrite), as_json)


def _shard(collections: Sequence[Collection], output: Output) -> None:
    """The common end of all commands; DataError (a non-zero exit) if nothing was written."""
    from data_tools.items import inventory
    from data_tools.pool import available_cores
    from data_tools.presets import parse_preset
    from data_tools.sharding import ShardOptions, plan_shards, shard

    options = ShardOptions(
        output.out, output.workers or available_cores(), output.seed, output.shard_samples, output.shard_mb,
        overwrite=output.overwrite, preset=parse_preset(output.preset),
    )  # fmt: skip
    if not output.plan_only:
        _print_report(shard(inventory(collections), options), output.as_json)
        return
    shards = plan_shards(inventory(collections), options)
    if output.as_json:
        print_json({"out": str(output.out), "shards": shards})
    else:
        typer.echo(f"{shards} shards planned: make them with `tubeworks data shard run {output.out}`")


def _print_report(report: ShardReport, as_json: bool) -> None:
    typer.echo(report.to_json() if as_json else report.to_text(), nl=not as_json)
    if not report.written:
        raise DataError(f"{report.out}: nothing was written: not one of the files could be used")
