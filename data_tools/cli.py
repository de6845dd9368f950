"""The commands `tubeworks data …`: names, options and output. The work is done by the modules beside it.

Those are imported inside the commands, so that help answers at once.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, List, Optional  # noqa: UP035 - evaluated by typer on 3.10

import typer

from data_tools import cli_check, cli_run, cli_shard
from data_tools.cli_options import AsJson, Folder, Seed, Workers, print_json

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Make, verify and inspect shards.")
app.add_typer(cli_shard.app, name="shard")
app.add_typer(cli_run.quarantine_app, name="quarantine")
app.command()(cli_run.audit)
app.command()(cli_check.verify)
app.command()(cli_check.index)
app.command()(cli_check.bench)


@app.callback()
def _start() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("data_tools").setLevel(logging.INFO)


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
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
        print_json({split: json.loads(report.to_json()) for split, report in reports.items()})
    else:
        for split, report in reports.items():
            typer.echo(f"{out / split}: {counted(report.written, report.shards)}")


@app.command("inspect")
def inspect_command(folder: Folder, as_json: AsJson = False) -> None:
    """Show what is in a folder of shards: counts, classes, sizes, durations, rates."""
    from data_tools.inspecting import inspect_shards, inspection_text

    summary = inspect_shards(folder)
    if as_json:
        print_json(summary)
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
        print_json(samples)
        return
    typer.echo(f"step {step}, rank {rank} of {world}, plan {samples['plan']}")
    for micro, sources in enumerate(samples["micro_batches"]):
        for name, rows in sources.items():
            typer.echo(f"micro-batch {micro}, {name}:")
            for row in rows:
                typer.echo(f"  epoch {row['epoch']}  {row['key']}")
