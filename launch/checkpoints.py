"""`tubeworks ckpt …`: list, show, verify, prune and consolidate the checkpoints of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from framework.errors import CheckpointError
from framework.training.checkpoint_manifest import (
    AVERAGE,
    FIXED,
    MANIFEST,
    checkpoint_folders,
    newest_valid,
    read_manifest,
    verify,
)
from framework.wording import counted

__all__ = [
    "consolidate_checkpoint",
    "list_checkpoints",
    "prune_checkpoints",
    "show_checkpoint",
    "verify_checkpoints",
]


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
        ranks = counted(row["ranks"], "rank")
        about = f"{ranks}, zero {row['zero']}, {row['precision']}, {', '.join(row['kinds'])}"
        typer.echo(f"{row['name']}  {row['bytes'] / 1e6:10.1f} MB  {about}")


def show_checkpoint(checkpoint: Path, as_json: bool) -> None:
    """Print what is in a checkpoint, or in the newest valid one of a run.

    Errors:
        CheckpointError: there is none.
    """
    folder = _checkpoint(checkpoint)
    manifest = read_manifest(folder)
    facts = _contents(folder, manifest)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{folder}")
    for key in ("step", "optimizer_steps", "skipped_steps", "ranks", "accumulation", "zero", "precision"):
        if facts.get(key) is not None:
            typer.echo(f"  {key:<16} {facts[key]}")
    for key in ("recipe", "plan", "quarantine", "mlflow_run", "average", "bytes"):
        if facts.get(key) is not None:
            typer.echo(f"  {key:<16} {facts[key]}")
    typer.echo("  tensors")
    for name, group in facts["groups"].items():
        typer.echo(f"    {name:<28} {group['tensors']:>6}  {group['bytes'] / 1e6:>10.2f} MB  {group['what']}")
    typer.echo("  attempts")
    for one in facts["attempts"]:
        typer.echo(
            f"    {one.get('attempt', '?'):>3}  from step {one.get('start_step', '?')}, "
            f"{one.get('ranks', '?')} ranks, on {one.get('host', '?')} since {one.get('started', '?')}"
        )


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


def prune_checkpoints(
    run: Path, keep: int | None, keep_every: int | None, *, dry_run: bool = False, as_json: bool = False
) -> None:
    """Remove old checkpoints, by default as the run's recipe says, but never the newest that is whole.

    Errors:
        CheckpointError: the run has no checkpoints, none of them is whole, or one cannot be removed.
    """
    from framework.recipe import load_recipe
    from framework.training.retention import remove, sort_out

    settings = load_recipe(str(run / "recipe.yaml")).recipe.checkpoint
    changed = {
        name: value for name, value in (("keep", keep), ("keep_every", keep_every)) if value is not None
    }
    settings = settings.model_copy(update=changed)
    # Listed before the newest whole one is looked for: what a training commits meanwhile is not touched.
    folders = _folders(run)
    whole = newest_valid(run)
    if whole in folders[: -settings.keep]:
        raise CheckpointError(
            f"the {settings.keep} newest checkpoints of {run} are damaged, {whole.name} is the newest that "
            "is whole: nothing was removed. Look at them with `tubeworks ckpt verify`"
        )
    sorted_out = sort_out(run, folders, settings)
    gone = [one.folder.name for one in sorted_out if not one.reasons and (dry_run or remove(one.folder))]
    if as_json:
        kept = {one.folder.name: list(one.reasons) for one in sorted_out if one.reasons}
        typer.echo(json.dumps({"dry_run": dry_run, "removed": gone, "kept": kept}, indent=2))
        return
    for name in gone:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    if not gone:
        typer.echo(f"nothing to remove: {counted(len(sorted_out), 'checkpoint')} kept")


def consolidate_checkpoint(checkpoint: Path, to: Path, ema: bool, as_json: bool) -> None:
    """Write the weights of a checkpoint to one file.

    Errors:
        CheckpointError: there is no valid checkpoint, or the file cannot be written.
    """
    from framework.training.consolidate import consolidate

    folder = _checkpoint(checkpoint)
    entry = consolidate(folder, to, ema)
    facts = {"checkpoint": str(folder), "file": str(to), **{key: entry[key] for key in ("bytes", "blake2b")}}
    if as_json:
        typer.echo(json.dumps({**facts, "weights": AVERAGE if ema else "raw"}, indent=2))
        return
    typer.echo(f"{to}: {entry['bytes'] / 1e6:.1f} MB from {folder}")


def _checkpoint(path: Path) -> Path:
    """A checkpoint that is named itself, or the newest valid one of a run."""
    if (path / MANIFEST).is_file():
        return path
    _folders(path)
    return newest_valid(path)


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


def _contents(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `show` says of a checkpoint."""
    known = (
        "step",
        "optimizer_steps",
        "skipped_steps",
        "ranks",
        "accumulation",
        "zero",
        "precision",
        "kinds",
    )
    about = {key: manifest.get(key) for key in (*known, "recipe", "plan", "quarantine", "mlflow_run")}
    return {
        "folder": str(folder),
        **about,
        "average": AVERAGE in manifest["kinds"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"]),
        "groups": _groups(folder, manifest),
        "attempts": manifest.get("attempts", []),
        "counters": manifest.get("counters", []),
        "files": manifest["files"],
        "recipe_yaml": manifest.get("recipe_yaml"),
    }


def _groups(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tensors and bytes by the first parts of their names; trained ones count once for each kind kept."""
    from framework.training.consolidate import TensorFile

    groups: dict[str, dict[str, Any]] = {}

    def count(name: str, size: int, what: str) -> None:
        group = groups.setdefault(_group_of(name), {"tensors": 0, "bytes": 0, "what": what})
        group["tensors"] += 1
        group["bytes"] += size
        if what not in group["what"]:
            group["what"] += f"; {what}"

    kinds = manifest["kinds"]
    for name, shape in manifest["shapes"].items():
        count(name, 4 * math.prod(shape) * len(kinds), ", ".join(kinds))
    if (folder / FIXED).is_file():
        fixed = TensorFile(folder / FIXED)
        for name, spec in fixed.specs.items():
            count(name, spec.bytes, "frozen or buffer")
        fixed.close()
    return dict(sorted(groups.items()))


def _group_of(name: str) -> str:
    """`blocks`, `tokenizer.tubes`, `heads.k400`, …: numbers and what follows them are left out."""
    parts = []
    for part in name.split(".")[:2]:
        if part.isdigit() or part in ("weight", "bias"):
            break
        parts.append(part)
    return ".".join(parts) or name
