"""Which checkpoints stay: the newest, those at round steps, and the best by a metric of the journal."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from framework import files
from framework.errors import CheckpointError
from framework.recipe.checkpoint_section import Best, Checkpoint
from framework.tracking.journal import journal_path
from framework.training.checkpoint_manifest import checkpoint_folders, looks_whole, step_of
from framework.training.storage import explain_os_error

__all__ = ["Kept", "prune", "remove", "scores", "sort_out"]


@dataclass(frozen=True)
class Kept:
    """A checkpoint and why it stays; no reasons: it goes."""

    folder: Path
    reasons: tuple[str, ...]


def sort_out(run: Path, folders: Sequence[Path], settings: Checkpoint) -> list[Kept]:
    """What retention says about checkpoints, given oldest first."""
    best = _best_steps(run, [step_of(folder) for folder in folders], settings.best)
    newest = {step_of(folder) for folder in folders[-settings.keep :]}
    sorted_out = []
    for folder in folders:
        step = step_of(folder)
        reasons = []
        if step in newest:
            reasons.append("newest")
        if settings.keep_every and step % settings.keep_every == 0:
            reasons.append(f"every {settings.keep_every}")
        if settings.best and step in best:
            reasons.append(f"best {settings.best.metric}")
        sorted_out.append(Kept(folder, tuple(reasons)))
    return sorted_out


def prune(run: Path, settings: Checkpoint) -> list[Path]:
    """Remove the checkpoints that retention does not keep; returns what was removed.

    Nothing is removed while the newest does not look whole (manifest and sizes). Somebody else may remove the
    same ones at the same time.

    Errors:
        CheckpointError: a folder cannot be renamed, or the newest is not whole.
    """
    folders = checkpoint_folders(run)
    doomed = [kept.folder for kept in sort_out(run, folders, settings) if not kept.reasons]
    if doomed and (problem := looks_whole(folders[-1])):
        raise CheckpointError(f"the newest checkpoint of {run} is not whole, older ones stay: {problem}")
    return [folder for folder in doomed if remove(folder)]


def remove(folder: Path) -> bool:
    """Remove a checkpoint; False if somebody else just did.

    Errors:
        CheckpointError: it cannot be renamed.
    """
    # Renamed first: from then on it is no checkpoint, whatever happens.
    target = folder.with_name(f".removing-{folder.name}")
    with explain_os_error(folder):
        try:
            files.disk.rename(folder, target)
        except FileNotFoundError:
            return False
    # On NFS a file that an evaluation reads keeps its folder; the next checkpoint tries again.
    files.disk.remove_tree(target)
    return True


def scores(run: Path, metric: str, steps: Collection[int]) -> dict[int, float]:
    """The last finite value that the journal has of a metric at each of these steps, where it has one."""
    path = journal_path(run)
    found: dict[int, float] = {}
    if not path.is_file():
        return found
    needle = json.dumps(metric).encode()
    with path.open("rb") as lines:
        for line in lines:
            if needle not in line:
                continue
            try:
                entry = json.loads(line)
                step, value = int(entry["step"]), entry["metrics"].get(metric)
            except (ValueError, KeyError, TypeError):  # a torn line
                continue
            if step in steps and isinstance(value, (int, float)) and math.isfinite(value):
                found[step] = float(value)
    return found


def _best_steps(run: Path, steps: Sequence[int], best: Best | None) -> set[int]:
    if best is None:
        return set()
    known = scores(run, best.metric, set(steps))
    sign = 1 if best.mode == "max" else -1
    # of equals the newer
    ranked = sorted(known, key=lambda step: (sign * known[step], step), reverse=True)
    return set(ranked[: best.keep])
