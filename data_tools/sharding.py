"""Sharding: an inventory becomes a folder of shards with a manifest, whole or not at all.

Three steps that may run in different processes, on different machines: `plan_shards` cuts the items into
shards and writes that down, `make_shards` makes any of them, `merge_shards` joins them to the final folder.
All work happens in `OUT.partial`; one rename at the end gives the folder its name. Whatever is killed or runs
out of room is continued by the same command. The bytes depend on the input and the options, and on nothing
else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.items import Inventory
from data_tools.merging import merge
from data_tools.pool import progress_bar, run_tasks
from data_tools.presets import PRESETS, Preset
from data_tools.report import REPORT_NAME, ShardReport
from data_tools.shard_plan import (
    ITEMS_NAME,
    PLAN_NAME,
    ShardPlan,
    adopt,
    cut,
    open_plan,
    staging_of,
    write_plan,
)
from data_tools.shard_writer import ShardTask, forget_plan, make_shard, read_record
from data_tools.staging import (
    MERGING,
    check_free,
    clear,
    remove_staging,
    staging_folder,
    sweep,
    was_finished,
)
from framework.errors import DataError

__all__ = ["ShardOptions", "make_shards", "merge_shards", "plan_shards", "shard", "unfinished"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOptions:
    """Where shards go, how media are stored, and where a shard ends: at so many samples or source bytes."""

    out: Path
    workers: int = 1
    seed: int = 0
    samples: int = 4096
    megabytes: int = 256
    overwrite: bool = False
    preset: Preset = PRESETS["archive"]

    def __post_init__(self) -> None:
        for name in ("workers", "samples", "megabytes"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")


def shard(inventory: Inventory, options: ShardOptions) -> ShardReport:
    """Plan, make and merge; return what was written, missing and left out.

    Raises DataError if `out` is taken or cannot be written; what was finished before a disk ran full stays in
    `OUT.partial` and is used by the next run. Where no item at all is usable, nothing is written.
    """
    out = Path(os.path.abspath(options.out))
    if not staging_of(out).exists():
        check_free(out, options.overwrite)
    with staging_folder(out) as staging:
        plan = _plan(staging, out, inventory, options)
        if was_finished(staging, out):
            return _leave(staging, out)
        _make(plan, range(len(plan.shards)), options.workers)
        return merge(plan, out, options.overwrite)


def plan_shards(inventory: Inventory, options: ShardOptions) -> int:
    """Write the plan to `OUT.partial`; the number of its shards. Raises DataError as `shard` does."""
    out = Path(os.path.abspath(options.out))
    if not staging_of(out).exists():
        check_free(out, options.overwrite)
    with staging_folder(out) as staging:
        return len(_plan(staging, out, inventory, options).shards)


def make_shards(out: Path, task: int, of: int, workers: int = 1) -> tuple[int, int]:
    """Make the shards `task`, `task + of`, `task + 2 of` … of a plan; how many there are, how many were new.

    Any number of processes on any machines may do this at the same time, for the same shards too. Raises
    DataError if nothing is planned for `out`, or if it cannot be written.
    """
    if not 0 <= task < of:
        raise DataError(f"task {task} of {of}: tasks count from 0 to {of - 1}")
    out = Path(os.path.abspath(out))
    with staging_folder(out, shared=True) as staging:
        plan = open_plan(staging)
        chosen = range(task, len(plan.shards), of)
        return len(chosen), _make(plan, chosen, workers, isolate=True)


def unfinished(out: Path) -> list[int]:
    """Numbers of the planned shards that are not made yet; DataError if nothing is planned."""
    plan = open_plan(staging_of(Path(os.path.abspath(out))))
    merging = (plan.folder / MERGING).exists()
    return [n for n in range(len(plan.shards)) if read_record(plan, n, merging=merging) is None]


def merge_shards(out: Path, *, overwrite: bool = False) -> ShardReport:
    """Join the shards of a plan to the folder `out`.

    Raises DataError if some are not made yet (it says which), if `out` is taken, or nothing is planned.
    """
    out = Path(os.path.abspath(out))
    with staging_folder(out, shared=False) as staging:
        plan = open_plan(staging)
        if was_finished(staging, out):
            return _leave(staging, out)
        check_free(out, overwrite)
        return merge(plan, out, overwrite)


def _plan(staging: Path, out: Path, inventory: Inventory, options: ShardOptions) -> ShardPlan:
    """A staging folder for exactly this plan; one of another plan is emptied, and that is said."""
    if options.preset.keeps_bytes and any(item.segment for item in inventory.items):
        raise DataError(
            "segments are cut out of videos, which needs encoding: take --preset balanced or fast"
            " (balanced:short_side=8192,crf=15 for nearly the pixels of the source)"
        )
    worked = sweep(staging)
    before = _digest_of(staging)
    cuts = cut(inventory.items, options.seed, options.samples, options.megabytes)
    plan = write_plan(staging, inventory, cuts, options.preset)
    if before == plan.digest and was_finished(staging, out):
        return plan
    check_free(out, options.overwrite)
    if before != plan.digest:
        if worked or before is not None:
            _logger.warning("%s is from other settings or other files: starting anew", staging)
        clear(staging, keep=(PLAN_NAME + ".new", ITEMS_NAME + ".new"))
    adopt(staging)
    forget_plan()
    return plan


def _digest_of(staging: Path) -> str | None:
    """What the plan in a folder stands for; None if there is none."""
    try:
        return open_plan(staging).digest
    except DataError:
        return None


def _leave(staging: Path, out: Path) -> ShardReport:
    """Tidy up behind a run that was killed when all was done; its report."""
    report = ShardReport.from_json(out, (out / REPORT_NAME).read_text(encoding="utf-8"))
    remove_staging(staging)
    return report


def _make(plan: ShardPlan, numbers: Sequence[int], workers: int, *, isolate: bool = False) -> int:
    """Make those of the shards that are not made yet; how many that were."""
    merging = (plan.folder / MERGING).exists()
    tasks = [
        ShardTask(number, plan.folder)
        for number in numbers
        if read_record(plan, number, merging=merging) is None
    ]
    done = len(numbers) - len(tasks)
    if done:
        _logger.info("continuing in %s: %d of %d shards are there already", plan.folder, done, len(numbers))
    with progress_bar("sharding", sum(plan.shards[task.number][2] for task in tasks)) as progress:
        for _ in run_tasks(make_shard, tasks, workers, progress, blame=ShardTask.without, isolate=isolate):
            pass
    return len(tasks)
