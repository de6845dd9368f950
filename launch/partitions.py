"""The partitions of a cluster, as `scontrol show partition` tells them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from framework.errors import SchedulerError
from launch import slurm
from launch.site import minutes
from launch.slurm_answers import parse_keys

__all__ = ["Partition", "choose_partition", "parse_partition", "partitions"]


@dataclass(frozen=True)
class Partition:
    """One partition; limits are None where there is none."""

    name: str
    default: bool
    state: str
    """UP, or why it starts no jobs."""
    nodes: str
    """In Slurm's short form: `c[1-3]`."""
    node_count: int
    max_nodes: int | None
    max_minutes: int | None
    priority_tier: int
    preempt_mode: str
    """OFF, REQUEUE, CANCEL, SUSPEND, …: what happens to its jobs when another partition wants the nodes."""
    grace_seconds: int
    """Between the signal of a preemption and the end."""


def partitions() -> list[Partition]:
    """All partitions that the user may see.

    Errors:
        SchedulerError: see `launch.slurm.run`.
    """
    text = slurm.run("scontrol", "show", "partition")
    return [parse_partition(parse_keys(block)) for block in text.split("\n\n") if block.strip()]


def parse_partition(keys: Mapping[str, str]) -> Partition:
    """A partition from the keys of its block."""

    def number(key: str) -> int | None:
        return int(keys[key]) if keys.get(key, "").isdigit() else None

    try:
        limit: int | None = minutes(keys.get("MaxTime", ""))
    except ValueError:  # UNLIMITED
        limit = None
    modes = re.split(r"[,;]", keys.get("PreemptMode", "OFF"))
    return Partition(
        name=keys.get("PartitionName", "?"),
        default=keys.get("Default") == "YES",
        state=keys.get("State", "UP"),
        nodes=keys.get("Nodes", ""),
        node_count=number("TotalNodes") or 0,
        max_nodes=number("MaxNodes"),
        max_minutes=limit,
        priority_tier=number("PriorityTier") or 0,
        preempt_mode=modes[0],
        grace_seconds=number("GraceTime") or 0,
    )


def choose_partition(name: str | None, known: Sequence[Partition]) -> Partition:
    """The partition that a job asks for, by default the cluster's.

    Errors:
        SchedulerError: there is none of that name; the nearest, or all, are named.
    """
    if name is None:
        for one in known:
            if one.default:
                return one
        raise SchedulerError(
            f"the cluster has no default partition: say --partition, one of {_names(known)}, or set "
            "`partition` in the site file"
        )
    for one in known:
        if one.name == name:
            return one
    near = difflib.get_close_matches(name, [one.name for one in known], n=1)
    guess = f"did you mean `{near[0]}`? There" if near else "there"
    raise SchedulerError(f"there is no partition `{name}`: {guess} are {_names(known)}")


def _names(known: Sequence[Partition]) -> str:
    return ", ".join(one.name for one in known) or "none"
