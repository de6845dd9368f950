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
from data_tools.cli_options import AsJson, Seed, Workers, print_json

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Make, verify and inspect shards.")
app.add_typer(cli_shard.app, name="shard")
app.add_typer(cli_run.quarantine_app, name="quarantine")
app.command()(cli_run.audit)
app.command()(cli_check.verify)
app.command()(cli_check.index)
app.command()(cli_check.bench)
app.command("export-ffcv")(cli_check.export_ffcv)


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
def inspect_command(
    what: Annotated[
        str, typer.Argument(metavar="DIR|URL|RECIPE", help="Folder of shards; with --step a recipe.")
    ],
    overrides: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Argument(metavar="KEY=VALUE", help="With --step: values that replace the recipe's."),
    ] = None,
    page: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", help="Write a page with contact sheets and histograms."),
    ] = None,
    step: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=10**12, help="Write the pictures of the batch that this step sees."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="With --step: a .png or .html file, by default step-N.png."),
    ] = None,
    world: Annotated[int, typer.Option("--world", min=1, help="With --step: number of ranks.")] = 1,
    rank: Annotated[int, typer.Option("--rank", min=0, help="With --step: which rank's share.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what is in a folder of shards (counts, classes, sizes, durations, rates), or what a step sees."""
    if step is not None:
        from data_tools.stepping import write_step
        from framework.recipe import load_recipe

        target = out or page or Path(f"step-{step}.png")
        resolved = load_recipe(what, overrides or []).recipe
        count = write_step(resolved, step, target, world=world, rank=rank)
        content = {"file": str(target), "step": step, "world": world, "rank": rank, "samples": count}
        if as_json:
            print_json(content)
        else:
            typer.echo(f"{target}: {count} samples of step {step}, rank {rank} of {world}")
        return
    from data_tools.inspecting import inspect_shards, inspection_text

    summary = inspect_shards(what)
    if as_json:
        print_json(summary)
    else:
        typer.echo(inspection_text(summary))
    if page is not None:
        from data_tools.page import write_page

        write_page(what, page)
        if not as_json:
            typer.echo(f"\n{page}: contact sheets and histograms")


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
    summary: Annotated[
        bool, typer.Option("--summary", help="Epochs, cores, cache, traffic and GPU-hours instead.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="With --summary.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="With --summary.")] = 8,
    hardware: Annotated[
        str, typer.Option(metavar="GPU|FILE", help="With --summary: as for `tubeworks describe`.")
    ] = "h100",
    measure: Annotated[
        int, typer.Option(min=0, help="With --summary: samples of each source to decode; 0: estimate.")
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """List the samples that one rank gets in one step of a recipe, or sum up what the run's data ask for."""
    if summary:
        _summarize(recipe, overrides or [], hardware, (nodes, gpus_per_node), measure, as_json)
        return
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


def _summarize(
    recipe: str,
    overrides: list[str],
    hardware: str,
    around: tuple[int, int],
    measured: int,
    as_json: bool,
) -> None:
    from framework.forecast.data import summarize_plan, summary_text
    from framework.forecast.hardware import find_hardware
    from framework.recipe import load_recipe

    nodes, gpus = around
    content = summarize_plan(
        load_recipe(recipe, overrides).recipe,
        find_hardware(hardware),
        nodes=nodes,
        gpus_per_node=gpus,
        measured=measured,
    )
    if as_json:
        print_json(content)
    else:
        typer.echo(summary_text(content))
