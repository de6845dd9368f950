"""What a person may ask of Slurm on the command line; what is not said comes from the site's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Optional

import typer

__all__ = ["QueueWishes", "Wishes"]

HERE = ("ranks_per_node",)
"""Wishes that `submit --local` can grant: this machine is one node, and no Slurm is asked."""


@dataclass(frozen=True)
class QueueWishes:
    """What any job may ask of the queue: options of `launch shard`; None: the site's default."""

    partition: Annotated[Optional[str], typer.Option(help="Slurm's partition.")] = None  # noqa: UP045
    time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Time limit: minutes, H:MM:SS, or D-HH:MM."),
    ] = None
    account: Annotated[Optional[str], typer.Option(help="Slurm's account.")] = None  # noqa: UP045
    qos: Annotated[Optional[str], typer.Option(help="Slurm's quality of service.")] = None  # noqa: UP045
    constraint: Annotated[Optional[str], typer.Option(help="Features of the nodes.")] = None  # noqa: UP045
    exclude: Annotated[Optional[str], typer.Option(help="Nodes to keep off.")] = None  # noqa: UP045

    def given(self) -> dict[str, Any]:
        """Those that were said."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Wishes(QueueWishes):
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
    container: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Container image for the ranks."),
    ] = None

    def of_slurm(self) -> dict[str, Any]:
        """The options that were said and that only Slurm can grant."""
        said = self.given()
        return {f"--{name.replace('_', '-')}": said[name] for name in said if name not in HERE}
