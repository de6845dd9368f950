"""`tubeworks launch plan`: what a submission would do and what would go wrong; nothing is submitted."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from framework.errors import CheckpointError, SchedulerError, TubeworksError
from framework.training.elastic import fitted
from launch import slurm
from launch.pace import Pace, pace_of
from launch.partitions import Partition, choose_partition, partitions
from launch.recipe_check import check_recipe
from launch.site import load_site
from launch.submission import Submission, newest_step
from launch.submit import (
    batch_script,
    check_folder,
    plan_submission,
    refuse_if_active,
)
from launch.wishes import Wishes

if TYPE_CHECKING:
    from framework.recipe.schema import Recipe

__all__ = ["Plan", "check_time", "plan_run", "usable_seconds"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """What a submission would do; `problems` would make it fail, `warnings` would not."""

    submission: Submission
    script: str
    """What sbatch would get."""
    estimate: slurm.Estimate | None
    """When and where it would start; None where Slurm refuses it."""
    pace: Pace
    steps: int
    """Of the recipe."""
    from_step: int
    """The newest checkpoint in the run folder."""
    reachable: int | None
    """The step at the end of one time limit; None while the time of a step is unknown."""
    epochs: dict[str, float] | None
    """Of each source, up to `reachable`."""
    jobs: int | None
    """How many time limits the run takes."""
    hours: float | None
    """Of steps and saves, from the newest checkpoint to the end."""
    gpu_hours: float | None
    """`hours` times all ranks."""
    free_bytes: int | None
    kept_checkpoints: int
    """So many lie in the run folder at the same time, with the one that is being written."""
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    exit_code: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_run(
    recipe: str,
    overrides: Sequence[str],
    wishes: Wishes,
    site_file: Path | None = None,
    run: Path | None = None,
    hardware: str | None = None,
) -> Plan:
    """Find out what `submit` with the same arguments would do.

    Errors:
        RecipeError: the recipe, the site file, a wish or the hardware.
        DataError: shards that are not there, or do not fit the recipe.
        SchedulerError: no Slurm, or its controller does not answer.
    """
    from framework.recipe import load_recipe
    from framework.recipe.paths import with_absolute_paths

    site = load_site(site_file)
    resolved = with_absolute_paths(load_recipe(recipe, overrides).recipe, Path.cwd())
    folder = (run or Path(site.runs) / resolved.name).resolve()
    submission = plan_submission(resolved, wishes, site, folder)
    samples = check_recipe(fitted(resolved, folder, submission.ranks), submission)
    known = partitions()
    problems = _Problems()
    problems.attempt(lambda: check_writable(folder))
    problems.attempt(lambda: check_folder(folder, resolved))
    problems.attempt(lambda: refuse_if_active(folder))
    partition = problems.attempt(lambda: choose_partition(submission.partition, known))
    pace = pace_of(folder, resolved, submission, hardware)
    problems.attempt(lambda: check_time(submission, pace, partition))
    script = batch_script(submission)
    estimate = problems.attempt(lambda: _estimate(script)) if partition is not None else None
    free, kept = _free_bytes(folder), _kept(resolved)
    problems.attempt(lambda: _check_space(folder, pace.bytes * kept, free))
    done = min(newest_step(folder), resolved.train.steps)
    figures = _reach(resolved, submission, pace, done, samples)
    return Plan(
        submission=submission,
        script=script,
        estimate=estimate,
        pace=pace,
        steps=resolved.train.steps,
        from_step=done,
        **figures,
        free_bytes=free,
        kept_checkpoints=kept,
        problems=tuple(str(problem) for problem in problems.found),
        warnings=tuple(_warnings(resolved, submission, pace, partition, figures["jobs"])),
        exit_code=problems.found[0].exit_code if problems.found else 0,
    )


class _Problems:
    """Collects what is wrong, so that one plan tells all of it."""

    def __init__(self) -> None:
        self.found: list[TubeworksError] = []

    def attempt(self, check: Callable[[], Found]) -> Found | None:
        """The check's answer; None where it found a problem. Without Slurm there is nothing to plan."""
        try:
            return check()
        except (slurm.SlurmMissing, slurm.SlurmDown):
            raise
        except TubeworksError as error:
            self.found.append(error)
            return None


def usable_seconds(submission: Submission, pace: Pace) -> float:
    """Seconds of one time limit that are left for steps, between the start and the warning to save."""
    return submission.minutes * 60 - submission.signal_seconds - pace.start


def check_time(submission: Submission, pace: Pace, partition: Partition | None) -> None:
    """Make sure that one time limit is long enough for a step and the checkpoint that keeps it.

    Errors:
        SchedulerError: it is not, or longer than the partition allows, or the warning comes too late to save.
    """
    limit = submission.minutes
    if partition is not None and partition.max_minutes is not None and limit > partition.max_minutes:
        raise SchedulerError(
            f"the time limit of {limit} min is longer than partition {partition.name} allows "
            f"({partition.max_minutes} min): the job would wait for ever. Ask for less; a run goes on "
            "after its limit by itself"
        )
    step = pace.step or 0.0
    if step + pace.save > submission.signal_seconds:
        raise SchedulerError(
            f"the ranks are told to save {submission.signal_seconds} s before the time limit, but a step "
            f"({_seconds(pace.step)}, {pace.step_origin}) and a save ({_seconds(pace.save)}, "
            f"{pace.save_origin}) take longer: raise `signal_seconds` in the site file"
        )
    if usable_seconds(submission, pace) <= step:
        needed = pace.start + step + submission.signal_seconds
        raise SchedulerError(
            f"the time limit of {limit} min is too short for one checkpoint: the start takes "
            f"{_seconds(pace.start)} ({pace.start_origin}), a step {_seconds(pace.step)}, and "
            f"{submission.signal_seconds} s before the end the ranks save (`signal_seconds`). "
            f"At least {int(needed // 60) + 1} min"
        )


def check_writable(folder: Path) -> None:
    """Make sure that the run folder can be made and written, by writing where it will be.

    Errors:
        CheckpointError: it cannot.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        descriptor, name = tempfile.mkstemp(prefix=".tubeworks-plan-", dir=place)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise CheckpointError(
            f"the run folder {folder} cannot be written: {place}: {error.strerror}. Choose another --run "
            "folder, or set `runs` in the site file"
        ) from error


def _estimate(script: str) -> slurm.Estimate:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.sh"
        path.write_text(script, encoding="utf-8")
        return slurm.estimate(path)


def _reach(
    recipe: Recipe, submission: Submission, pace: Pace, done: int, samples: Mapping[str, int]
) -> dict[str, Any]:
    """How far one time limit goes, and what the whole run costs; `samples` are those of each source."""
    left = recipe.train.steps - done
    if pace.step is None:
        return dict.fromkeys(("reachable", "epochs", "jobs", "hours", "gpu_hours"))
    one = pace.step + pace.stall / recipe.checkpoint.every
    steps = int(max(0.0, usable_seconds(submission, pace)) / one)
    reachable = done + min(left, steps)
    hours = left * one / 3600
    return {
        "reachable": reachable,
        "epochs": {name: reachable * count / samples[name] for name, count in recipe.data.samples.items()},
        "jobs": -(-left // steps) if steps else None,
        "hours": hours,
        "gpu_hours": hours * submission.ranks,
    }


def _kept(recipe: Recipe) -> int:
    """Checkpoints that lie in the run folder at the same time."""
    settings, steps = recipe.checkpoint, recipe.train.steps
    kept = settings.keep + (settings.best.keep if settings.best else 0)
    kept += steps // settings.keep_every if settings.keep_every else 0
    return min(kept, -(-steps // settings.every)) + 1


def _free_bytes(folder: Path) -> int | None:
    for place in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def _check_space(folder: Path, needed: int, free: int | None) -> None:
    if free is not None and needed > free:
        raise CheckpointError(
            f"the checkpoints of {folder} need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there: "
            "make room, keep fewer (`checkpoint.keep`, `keep_every`), or choose another --run folder"
        )


def _warnings(
    recipe: Recipe, submission: Submission, pace: Pace, partition: Partition | None, jobs: int | None
) -> list[str]:
    found = []
    if pace.step is None:
        found.append(f"the time of a step is {pace.step_origin}")
    elif recipe.checkpoint.every * pace.step > usable_seconds(submission, pace):
        found.append(
            f"the first regular checkpoint (`checkpoint.every: {recipe.checkpoint.every}`) lies behind the "
            "time limit: whatever breaks before that, the job starts anew"
        )
    if jobs is not None and jobs - 1 > submission.max_requeues:
        found.append(
            f"{jobs} time limits are needed, and the job is requeued {submission.max_requeues} times "
            "(`max_requeues`): go on with `tubeworks launch resubmit` then"
        )
    if partition is None:
        return found
    if partition.state != "UP":
        found.append(f"partition {partition.name} starts no jobs: it is {partition.state}")
    need = (pace.step or 0.0) + pace.save
    if partition.preempt_mode not in ("OFF", "SUSPEND", "GANG") and partition.grace_seconds < need:
        found.append(
            f"a preemption leaves {partition.grace_seconds} s (GraceTime of {partition.name}), a step and a "
            f"save take {_seconds(need)}: what was done since the last checkpoint may be lost"
        )
    return found


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g} s"
