"""The commands `tubeworks data …`: names, options and output. The work is done by the modules beside it.

Those are imported inside the commands, so that help answers at once.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, List, Optional  # noqa: UP035 - evaluated by typer on 3.10

import typer

from data_tools import cli_check, cli_run, cli_shard
from data_tools.cli_options import AsJson, Seed, Workers, grouped, print_json, refuse_given
from framework.wording import counted

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


@dataclass(frozen=True)
class Digits:
    """How many moving digits, and how large."""

    size: Annotated[int, typer.Option(help="Side of the canvas in pixels.")] = 32
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16
    train_videos: Annotated[int, typer.Option(min=0)] = 4096
    val_videos: Annotated[int, typer.Option(min=0)] = 512
    train_images: Annotated[int, typer.Option(min=0)] = 4096
    val_images: Annotated[int, typer.Option(min=0)] = 512


@app.command()
@grouped
def synth(
    out: Annotated[Path, typer.Option("--out", help="Folder for the shard sets train and val.")],
    digits: Digits,
    seed: Seed = 0,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make moving digits: videos labelled with the direction of motion, images labelled with the digit."""
    from data_tools.pool import available_cores
    from data_tools.report import in_shards
    from data_tools.synth import SynthOptions, synthesize

    options = SynthOptions(
        out, **asdict(digits), seed=seed, workers=workers or available_cores(), overwrite=overwrite
    )
    reports = synthesize(options)
    if as_json:
        print_json({split: json.loads(report.to_json()) for split, report in reports.items()})
    else:
        for split, report in reports.items():
            typer.echo(f"{out / split}: {in_shards(report.written, report.shards)}")


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
    world: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--world", min=1, help="With --step: number of ranks, by default 1."),
    ] = None,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--rank", min=0, help="With --step: which rank's share, by default 0."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a folder of shards (counts, classes, sizes, durations, rates), or what a step sees."""
    if step is not None:
        if page is not None:
            refuse_given({"--out": out}, "--html names the file of --step already; leave one of them out")
        _show_step(what, overrides or [], step, out or page, (world or 1, rank or 0), as_json)
        return
    ignored = {"--out": out, "--world": world, "--rank": rank, "KEY=VALUE": overrides}
    refuse_given(ignored, "needs --step, which makes the pictures of a recipe's step")
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


def _show_step(
    recipe: str, overrides: list[str], step: int, file: Path | None, share: tuple[int, int], as_json: bool
) -> None:
    from data_tools.stepping import write_step
    from framework.recipe import load_recipe

    target, (world, rank) = file or Path(f"step-{step}.png"), share
    resolved = load_recipe(recipe, overrides).recipe
    count = write_step(resolved, step, target, world=world, rank=rank)
    if as_json:
        print_json({"file": str(target), "step": step, "world": world, "rank": rank, "samples": count})
    else:
        typer.echo(f"{target}: {counted(count, 'sample')} of step {step}, rank {rank} of {world}")


@dataclass(frozen=True)
class Share:
    """Which samples are listed."""

    step: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--step", min=0, max=10**12, help="Global step, by default 0."),
    ] = None
    world: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--world", min=1, help="Number of ranks, by default 1."),
    ] = None
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--rank", min=0, help="Which rank's share, by default 0."),
    ] = None


@dataclass(frozen=True)
class Cluster:
    """What a summary is made for."""

    nodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --summary, by default 1."),
    ] = None
    gpus_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --summary, by default 8."),
    ] = None
    hardware: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="GPU|FILE", help="With --summary: as for `tubeworks describe`; else h100."),
    ] = None
    measure: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="With --summary: samples of each source to decode, 8; 0: estimate."),
    ] = None


def _flags(group: Share | Cluster) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in asdict(group).items()}


@app.command()
@grouped
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Path or name of a recipe.")],
    share: Share,
    cluster: Cluster,
    overrides: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's."),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Epochs, cores, cache, traffic and GPU-hours instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the samples that one rank gets in one step of a recipe, or sum up what the run's data ask for."""
    if summary:
        refuse_given(_flags(share), "does not go with --summary, which sums up all steps and ranks")
        _summarize(recipe, overrides or [], cluster, as_json)
        return
    refuse_given(_flags(cluster), "needs --summary")
    from framework.data.listing import listing
    from framework.recipe import load_recipe

    step, world, rank = share.step or 0, share.world or 1, share.rank or 0
    samples = listing(load_recipe(recipe, overrides or []).recipe, step, world, rank)
    if as_json:
        print_json(samples)
        return
    typer.echo(f"step {step}, rank {rank} of {world}, plan {samples['plan']}")
    for micro, sources in enumerate(samples["micro_batches"]):
        for name, rows in sources.items():
            views = samples["repeats"][name]
            typer.echo(f"micro-batch {micro}, {name}{f', {views} views of each' if views > 1 else ''}:")
            for row in rows:
                typer.echo(f"  epoch {row['epoch']}  {row['key']}")


def _summarize(recipe: str, overrides: list[str], cluster: Cluster, as_json: bool) -> None:
    from framework.forecast.data import summarize_plan, summary_text
    from framework.forecast.hardware import find_hardware
    from framework.recipe import load_recipe

    content = summarize_plan(
        load_recipe(recipe, overrides).recipe,
        find_hardware(cluster.hardware or "h100"),
        nodes=cluster.nodes or 1,
        gpus_per_node=cluster.gpus_per_node or 8,
        measured=8 if cluster.measure is None else cluster.measure,
    )
    if as_json:
        print_json(content)
    else:
        typer.echo(summary_text(content))
