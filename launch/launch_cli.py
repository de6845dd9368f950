"""`tubeworks launch …`: steering trainings that run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Watch and steer trainings.")


@app.callback()
def group() -> None:
    """Watch and steer trainings."""


@app.command("ctl")
def control(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    command: Annotated[
        Literal["checkpoint", "stack", "profile", "stop", "exclude"],
        typer.Argument(help="What the training is asked for."),
    ],
    argument: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it on Python 3.10
        typer.Argument(metavar="STEPS|NODE", help="Steps of `profile` (3), or the node of `exclude`."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Ask a running training to save, stop, show its stacks, profile some steps, or leave a node.

    `stack` works while the job hangs. `exclude` saves, ends the attempt and keeps NODE out of the next one.
    """
    from launch.control import control_command

    control_command(run, command, argument, wait, as_json)
