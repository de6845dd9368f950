"""Whether a folder may become that of a run, and folders that nothing came of. Needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from framework.errors import RecipeError

__all__ = ["OWN_NAMES", "check_place", "has_begun", "missing_folders", "remove_empty"]

OWN_NAMES = frozenset(
    (
        "bad_nodes.json",
        "checkpoints",
        "code",
        "control",
        "data.json",
        "evaluations",
        "events.jsonl",
        "excluded-nodes.json",
        "exports",
        "git.diff",
        "heartbeat",
        "import.json",
        "journal.jsonl",
        "launch",
        "ledger.bin",
        "logs",
        "mlflow.json",
        "pictures",
        "postmortem",
        "profiles",
        "quarantine.jsonl",
        "recipe.yaml",
        "run.json",
        "stacks",
        "tracking.json",
    )
)
"""What trainings and their launchers put into a run folder (docs/operators.md, "The run folder")."""

OF_THE_DISK = "lost+found"
"""A new ext4 disk has it, and may be mounted for a run."""

LOGS = (".log", ".out", ".err")
"""Whoever starts a training may send its output there: `nohup`, a batch script."""


def check_place(run: Path) -> None:
    """Make sure that a folder is a run, or holds nothing that a run would get mixed up with.

    Errors:
        RecipeError: it holds files of something else; the first ones are named.
    """
    if not run.is_dir() or any((run / name).exists() for name in ("run.json", "recipe.yaml")):
        return
    others = sorted(
        path.name
        for path in run.iterdir()
        if path.name not in OWN_NAMES | {OF_THE_DISK}
        and not path.name.startswith(".")
        and path.suffix not in LOGS
    )
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise RecipeError(
            f"{run} is no run, and holds {', '.join(others[:3])}{more}: choose a new or an empty folder "
            "with --run"
        )


def has_begun(run: Path) -> bool:
    """Whether a training has begun in the folder."""
    return (run / "run.json").exists()


def missing_folders(folder: Path) -> list[Path]:
    """Those of a folder and the ones above it that are not there, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
