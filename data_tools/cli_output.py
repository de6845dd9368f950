"""What all commands that make shards share: where shards go, how, and the report at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from data_tools.cli_options import AsJson, Seed, Workers, print_json
from framework.errors import DataError
from framework.wording import counted

if TYPE_CHECKING:
    from data_tools.items import Collection
    from data_tools.report import ShardReport
    from framework.data.datasets import Kind

__all__ = [
    "Annotations",
    "Classes",
    "KindName",
    "Name",
    "Output",
    "Overwrite",
    "Split",
    "Videos",
    "kind_of",
    "make",
    "print_report",
]

Split = Annotated[str, typer.Option("--split", help="Which split these samples are.")]
Classes = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--classes", help="Order of classes: a text file, one a line, or shards made before."),
]
KindName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--kind", help="image or video, where both are there."),
]


Videos = Annotated[Path, typer.Option("--videos", help="Folder of videos, flat or in folders of any depth.")]
Annotations = Annotated[Path, typer.Option("--annotations", help="The official list of the split.")]
Name = Annotated[str, typer.Option("--name", help="Name of the data set.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")]


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


def kind_of(text: str | None) -> Kind | None:
    """The media kind that `--kind` says."""
    if text not in (None, "image", "video"):
        raise typer.BadParameter(f"--kind is image or video, not {text}")
    return text


def make(collections: Sequence[Collection], output: Output) -> None:
    """The common end of all commands: plan, make and merge the shards, or only plan them."""
    from data_tools.items import inventory
    from data_tools.pool import available_cores
    from data_tools.presets import parse_preset
    from data_tools.sharding import ShardOptions, plan_shards, shard

    options = ShardOptions(
        output.out, output.workers or available_cores(), output.seed, output.shard_samples, output.shard_mb,
        overwrite=output.overwrite, preset=parse_preset(output.preset),
    )  # fmt: skip
    if not output.plan_only:
        print_report(shard(inventory(collections), options), output.as_json)
        return
    shards = plan_shards(inventory(collections), options)
    if output.as_json:
        print_json({"out": str(output.out), "shards": shards})
    else:
        typer.echo(
            f"{counted(shards, 'shard')} planned: make them with `tubeworks data shard run {output.out}`"
        )


def print_report(report: ShardReport, as_json: bool) -> None:
    """Print the report; DataError (a non-zero exit) if nothing was written."""
    typer.echo(report.to_json() if as_json else report.to_text(), nl=not as_json)
    if not report.written:
        raise DataError(f"{report.out}: nothing was written: not one of the files could be used")
