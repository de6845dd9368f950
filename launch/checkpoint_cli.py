"""The command line of `tubeworks ckpt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = ["checkpoint_app"]

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify, prune and convert checkpoints.")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
RunOrCheckpoint = Annotated[
    Path,
    typer.Argument(metavar="RUN|CHECKPOINT", help="A run (its newest valid checkpoint), or one of them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@checkpoint_app.command("list")
def checkpoint_list(run: Run, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first."""
    from launch.checkpoints import list_checkpoints

    list_checkpoints(run, as_json)


@checkpoint_app.command("show")
def checkpoint_show(checkpoint: RunOrCheckpoint, as_json: AsJson = False) -> None:
    """Say what is in a checkpoint: tensors by group, recipe, plan, attempts."""
    from launch.checkpoints import show_checkpoint

    show_checkpoint(checkpoint, as_json)


@checkpoint_app.command("verify")
def checkpoint_verify(run: Run, as_json: AsJson = False) -> None:
    """Compare every byte of the checkpoints with their manifests."""
    from launch.checkpoints import verify_checkpoints

    verify_checkpoints(run, as_json)


@checkpoint_app.command("prune")
def checkpoint_prune(
    run: Run,
    keep: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="The newest so many stay; by default what the recipe says."),
    ] = None,
    keep_every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Multiples of this step stay too; by default what the recipe says."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints; safe beside a training."""
    from launch.checkpoints import prune_checkpoints

    prune_checkpoints(run, keep, keep_every, dry_run=dry_run, as_json=as_json)


@checkpoint_app.command("consolidate")
def checkpoint_consolidate(
    checkpoint: RunOrCheckpoint,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The safetensors file to write.")],
    ema: Annotated[bool, typer.Option("--ema", help="The moving averages of the weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put all weights of a checkpoint into one safetensors file; needs little memory."""
    from launch.checkpoints import consolidate_checkpoint

    consolidate_checkpoint(checkpoint, to, ema, as_json)
