"""`tubeworks ckpt …`: list, verify and prune the checkpoints of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from framework.errors import CheckpointError
from framework.training.checkpoint_manifest import checkpoint_folders, read_manifest, verify

__all__ = ["list_checkpoints", "prune_checkpoints", "verify_checkpoints"]


def list_checkpoints(run: Path, as_json: bool) -> None:
    """Print one line per checkpoint, oldest first, from the manifests alone.

    Errors:
        CheckpointError: the run has no checkpoints.
    """
    rows = [_facts(folder) for folder in _folders(run)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        if "problem" in row:
            typer.echo(f"{row['name']}  {row['problem']}")
            continue
        about = f"{row['ranks']} ranks, zero {row['zero']}, {row['precision']}, {', '.join(row['kinds'])}"
        typer.echo(f"{row['name']}  {row['bytes'] / 1e6:10.1f} MB  {about}")


def verify_checkpoints(run: Path, as_json: bool) -> None:
    """Compare every byte of every checkpoint with its manifest.

    Errors:
        CheckpointError: the run has no checkpoints, or one of them is not whole.
    """
    found = {folder.name: _problems(folder) for folder in _folders(run)}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for name, problems in found.items():
            typer.echo(f"{name}  {'; '.join(problems) or 'whole'}")
    damaged = [name for name, problems in found.items() if problems]
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(found)} checkpoints of {run} are not whole: {', '.join(damaged)}. "
            "A training goes on from the newest that is"
        )


def prune_checkpoints(run: Path, keep: int | None, keep_every: int | None) -> None:
    """Remove old checkpoints, by default as the run's recipe says, but never the newest that is whole.

    Errors:
        CheckpointError: the run has no checkpoints, none of them is whole, or one cannot be removed.
    """
    from framework.recipe import load_recipe
    from framework.training.checkpoint import newest_valid, prune

    settings = load_recipe(str(run / "recipe.yaml")).recipe.checkpoint
    keep = settings.keep if keep is None else keep
    whole = newest_valid(run)
    if whole not in _folders(run)[-keep:]:
        raise CheckpointError(
            f"the {keep} newest checkpoints of {run} are damaged, {whole.name} is the newest that is whole: "
            "nothing was removed. Look at them with `tubeworks ckpt verify`"
        )
    for folder in prune(run, keep, settings.keep_every if keep_every is None else keep_every):
        typer.echo(f"removed {folder.name}")


def _folders(run: Path) -> list[Path]:
    folders = checkpoint_folders(run)
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}")
    if not folders:
        damaged = sorted(path.name for path in run.glob("checkpoints/damaged-*"))
        aside = f", only what was set aside as damaged: {', '.join(damaged)}" if damaged else ""
        raise CheckpointError(f"there are no checkpoints in {run / 'checkpoints'}{aside}")
    return folders


def _problems(folder: Path) -> list[str]:
    try:
        return verify(folder)
    except CheckpointError as error:
        return [str(error)]


def _facts(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return {"name": folder.name, "problem": str(error)}
    known = ("step", "ranks", "zero", "precision", "kinds")
    size = sum(entry["bytes"] for entry in manifest["files"])
    return {"name": folder.name, **{key: manifest.get(key) for key in known}, "bytes": size}
