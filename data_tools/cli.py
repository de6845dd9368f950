"""The commands `tubeworks data …`: names, options and output. The work is done by the modules beside it.

Those are imported inside the commands, so that help answers at once.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, List, Optional  # noqa: UP035 - evaluated by typer on 3.10

import typer

from framework.errors import DataError

if TYPE_CHECKING:
    from data_tools.items import Collection
    from data_tools.report import ShardReport

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Make, verify and inspect shards.")
shard_app = typer.Typer(no_args_is_help=True, help="Turn videos and images into shards with a manifest.")
app.add_typer(shard_app, name="shard")

Out = Annotated[Path, typer.Option("--out", help="Folder for the shards; it must not exist yet.")]
Split = Annotated[str, typer.Option("--split", help="Which split these samples are.")]
Classes = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--classes", help="Order of classes: a text file, one a line, or shards made before."),
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--workers", min=1, help="Processes; by default one per core."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Decides the order of samples.")]
ShardSamples = Annotated[int, typer.Option("--shard-samples", min=1, help="A shard has at most so many.")]
ShardMegabytes = Annotated[int, typer.Option("--shard-mb", min=1, help="A shard ends at so many MiB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")]
Kind = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--kind", help="image or video, where both are there."),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards.")]


@app.callback()
def _start() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("data_tools").setLevel(logging.INFO)


@shard_app.command("kinetics")
def shard_kinetics(
    videos: Annotated[Path, typer.Option("--videos", help="Folder of clips, flat or in class folders.")],
    annotations: Annotated[Path, typer.Option("--annotations", help="Official CSV list.")],
    split: Annotated[str, typer.Option("--split", help="Split of the list: train, val or test.")],
    out: Out,
    name: Annotated[str, typer.Option("--name", help="Name of the data set.")] = "k400",
    classes: Classes = None,
    workers: Workers = None,
    seed: Seed = 0,
    shard_samples: ShardSamples = 4096,
    shard_mb: ShardMegabytes = 256,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Shard clips named by an official Kinetics list; missing and damaged files are reported and left out."""
    from data_tools.classes import read_classes
    from data_tools.kinetics import collect_kinetics

    given = read_classes(classes, name, "video") if classes else None
    collection = collect_kinetics(videos, annotations, name, split=split, classes=given)
    _shard([collection], out, workers, seed, (shard_samples, shard_mb), overwrite, as_json)


@shard_app.command("folder")
def shard_folder(
    inputs: Annotated[
        List[Path],  # noqa: UP006
        typer.Option("--input", help="Folder with class folders, or a tar archive and a path in it."),
    ],
    out: Out,
    names: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Option("--name", help="Name of the data set: one for each --input, or one for all."),
    ] = None,
    split: Split = "train",
    kind: Kind = None,
    classes: Classes = None,
    workers: Workers = None,
    seed: Seed = 0,
    shard_samples: ShardSamples = 4096,
    shard_mb: ShardMegabytes = 256,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Shard class folders of images or videos; several inputs give mixed shards.

    Inputs of the same name become one data set.
    """
    from data_tools.folder import collect_folder, default_name

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
    _shard(collections, out, workers, seed, (shard_samples, shard_mb), overwrite, as_json)


@shard_app.command("mix")
def shard_mix(
    inputs: Annotated[
        List[str],  # noqa: UP006
        typer.Option(
            "--input",
            metavar="NAME=FORM:OPTION=VALUE,…",
            help="One input, see above; may be given several times.",
        ),
    ],
    out: Out,
    workers: Workers = None,
    seed: Seed = 0,
    shard_samples: ShardSamples = 4096,
    shard_mb: ShardMegabytes = 256,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Shard several inputs, videos and images, into one set of mixed shards.

    An input is NAME=kinetics:videos=DIR,annotations=CSV,split=S
    or NAME=folder:input=DIR, with more options after commas: classes=FILE for
    both; split=S and kind=image|video for a folder. DIR may be a tar archive
    with a path in it, as in set.tar/train.
    """
    from data_tools.mix import collect_input

    collections = [collect_input(text) for text in inputs]
    _shard(collections, out, workers, seed, (shard_samples, shard_mb), overwrite, as_json)


@app.command()
def synth(
    out: Annotated[Path, typer.Option("--out", help="Folder for the shard sets train and val.")],
    size: Annotated[int, typer.Option(help="Side of the canvas in pixels.")] = 32,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    train_videos: Annotated[int, typer.Option(min=0)] = 4096,
    val_videos: Annotated[int, typer.Option(min=0)] = 512,
    train_images: Annotated[int, typer.Option(min=0)] = 4096,
    val_images: Annotated[int, typer.Option(min=0)] = 512,
    seed: Seed = 0,
    workers: Workers = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make moving digits: videos labelled with the direction of motion, images labelled with the digit."""
    from data_tools.pool import available_cores
    from data_tools.report import counted
    from data_tools.synth import SynthOptions, synthesize

    options = SynthOptions(
        out, size, frames, train_videos, val_videos, train_images, val_images, seed,
        workers or available_cores(), overwrite,
    )  # fmt: skip
    reports = synthesize(options)
    if as_json:
        _print_json({split: json.loads(report.to_json()) for split, report in reports.items()})
    else:
        for split, report in reports.items():
            typer.echo(f"{out / split}: {counted(report.written, report.shards)}")


@app.command()
def verify(
    folder: Folder,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every sample as well.")] = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Compare every byte of a folder of shards with its manifest."""
    from data_tools.pool import available_cores
    from data_tools.verify import verify as verify_shards

    report = verify_shards(folder, decode=decode, workers=workers or available_cores())
    if as_json:
        _print_json(report.content())
    else:
        typer.echo(report.to_text())
    if report.problems:
        raise typer.Exit(DataError.exit_code)


@app.command("inspect")
def inspect_command(folder: Folder, as_json: AsJson = False) -> None:
    """Show what is in a folder of shards: counts, classes, sizes, durations, rates."""
    from data_tools.inspecting import inspect_shards, inspection_text

    summary = inspect_shards(folder)
    if as_json:
        _print_json(summary)
    else:
        typer.echo(inspection_text(summary))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Path or name of a recipe.")],
    overrides: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's."),
    ] = None,
    step: Annotated[int, typer.Option("--step", min=0, max=10**12, help="Global step.")] = 0,
    world: Annotated[int, typer.Option("--world", min=1, help="Number of ranks.")] = 1,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Which rank's share.")] = 0,
    as_json: AsJson = False,
) -> None:
    """List the samples that one rank gets in one step of a recipe."""
    from framework.data.listing import listing
    from framework.recipe import load_recipe

    samples = listing(load_recipe(recipe, overrides or []).recipe, step, world, rank)
    if as_json:
        _print_json(samples)
        return
    typer.echo(f"step {step}, rank {rank} of {world}, plan {samples['plan']}")
    for micro, sources in enumerate(samples["micro_batches"]):
        for name, rows in sources.items():
            typer.echo(f"micro-batch {micro}, {name}:")
            for row in rows:
                typer.echo(f"  epoch {row['epoch']}  {row['key']}")


def _shard(
    collections: list[Collection],
    out: Path,
    workers: int | None,
    seed: int,
    limits: tuple[int, int],
    overwrite: bool,
    as_json: bool,
) -> None:
    """The common end of all `shard` commands; DataError (a non-zero exit) if nothing was written."""
    from data_tools.items import inventory
    from data_tools.pool import available_cores
    from data_tools.sharding import ShardOptions, shard

    options = ShardOptions(out, workers or available_cores(), seed, *limits, overwrite=overwrite)
    report: ShardReport = shard(inventory(collections), options)
    typer.echo(report.to_json() if as_json else report.to_text(), nl=not as_json)
    if not report.written:
        raise DataError(f"{out}: nothing was written: not one of the files could be used")


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False, default=str))
