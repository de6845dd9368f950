"""Every command that reports has `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from launch.cli import app

REPORTS_NOTHING = {
    "train": "it speaks while it works; RUN/journal.jsonl and run.json are for programs",
}
"""Commands without `--json`, and why."""


def commands(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """All commands below a node of the command line, with the names of their options."""
    for name, child in getattr(node, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from commands(child, (*path, name))
        else:
            yield " ".join((*path, name)), {option for one in child.params for option in one.opts}


def test_every_command_that_reports_has_json() -> None:
    found = dict(commands(get_command(app)))
    assert {"data shard folder", "launch status", "ckpt list", "describe"} <= found.keys(), "all are walked"
    assert {name for name, options in found.items() if "--json" not in options} == REPORTS_NOTHING.keys()
