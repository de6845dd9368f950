"""What a person may ask of Slurm on the command line; what is not said comes from the site's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Optional

import typer

__all__ = ["Wishes"]


@dataclass(frozen=True)
class Wishes:
    """Options of `launch plan`, `submit` and `resubmit`; None: the site's default."""

    nodes: Annotated[Optional[int], typer.Option(min=1, help="Machines.")] = None  # noqa: UP045
    gpus_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="GPUs of each machine, one rank for each."),
    ] = None
    ranks_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Ranks on each machine, by default one per GPU."),
    ] = None
    partition: Annotated[Optional[str], typer.Option(help="Slurm's partition.")] = None  # noqa: UP045
    time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Time limit: minutes, H:MM:SS, or D-HH:MM."),
    ] = None
    account: Annotated[Optional[str], typer.Option(help="Slurm's account.")] = None  # noqa: UP045
    qos: Annotated[Optional[str], typer.Option(help="Slurm's quality of service.")] = None  # noqa: UP045
    constraint: Annotated[Optional[str], typer.Option(help="Features of the nodes.")] = None  # noqa: UP045
    exclude: Annotated[Optional[str], typer.Option(help="Nodes to keep off.")] = None  # noqa: UP045
    container: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Container image for the ranks."),
    ] = None

    def given(self) -> dict[str, Any]:
        """Those that were said."""
        return {name: value for name, value in vars(self).items() if value is not None}
