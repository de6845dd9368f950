"""`tubeworks launch shard OUT`: the shards of a plan made by an array of jobs, and joined by one more.

`OUT.jobs` holds code, pickles and logs of the jobs. The last job makes what killed ones left undone, so that
the folder is complete although elements died; submitted again, only what is missing is made.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from framework.errors import DataError, RecipeError
from launch.site import load_site, minutes
from launch.snapshot import take_snapshot
from launch.submission import Submission
from launch.submit import executor_of, slurm_errors
from launch.wishes import QueueWishes

__all__ = ["ShardJobs", "finish", "make_part", "submit_shards"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardJobs:
    """The jobs of one submission."""

    out: str
    shards: int
    """How many were still to be made."""
    tasks: tuple[int, ...]
    """Numbers of the tasks that were submitted; others had nothing left to do."""
    jobs: tuple[str, ...]
    last_job: str
    logs: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def submit_shards(
    out: Path,
    tasks: int,
    workers: int,
    wishes: QueueWishes,
    site_file: Path | None = None,
    *,
    overwrite: bool = False,
) -> ShardJobs:
    """Submit an array of `tasks` jobs for the shards planned for `out`, and the job that joins them.

    Errors:
        DataError: nothing is planned for `out`.
        RecipeError: the site file, or a wish.
        SchedulerError: no Slurm, or it refuses.
    """
    from data_tools.sharding import unfinished

    out = Path(os.path.abspath(out))
    left = unfinished(out)
    chosen = tuple(sorted({number % tasks for number in left}))
    folder = out.with_name(out.name + ".jobs")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    take_snapshot(folder / "code")
    asked = _submission(folder, f"shard-{out.name}", workers, wishes, site_file)
    jobs: tuple[str, ...] = ()
    if chosen:
        log_file = {"output": f"{folder}/logs/slurm-%A_%a.log"}
        executor = executor_of(replace(asked, sbatch={**log_file, **asked.sbatch}))
        with slurm_errors(), executor.batch():
            made = [executor.submit(make_part, str(out), task, tasks, workers) for task in chosen]
        jobs = tuple(str(job.job_id) for job in made)
    after = {"dependency": f"afterany:{jobs[0].partition('_')[0]}"} if jobs else {}
    executor = executor_of(replace(asked, name=f"join-{out.name}", sbatch={**after, **asked.sbatch}))
    with slurm_errors():
        last = executor.submit(finish, str(out), workers, overwrite)
    return ShardJobs(str(out), len(left), chosen, jobs, str(last.job_id), f"{folder}/logs")


def make_part(out: str, task: int, of: int, workers: int) -> None:
    """What an element of the array runs.

    Errors:
        DataError: the shards cannot be written.
    """
    from data_tools.sharding import make_shards

    _log_to_stderr()
    count, new = make_shards(Path(out), task, of, workers)
    log.info("task %d of %d: %d shards, %d of them made now", task, of, count, new)


def finish(out: str, workers: int, overwrite: bool) -> None:
    """What the last job runs: make what is missing, then join; leaves with an error code if it cannot."""
    from data_tools.sharding import make_shards, merge_shards, unfinished

    _log_to_stderr()
    try:
        left = unfinished(Path(out))
        if left:
            log.warning("shards %s were left undone: they are made now", ", ".join(map(str, left[:20])))
            make_shards(Path(out), 0, 1, workers)
        merge_shards(Path(out), overwrite=overwrite)
    except DataError as error:
        log.error("error: %s", error)
        sys.exit(error.exit_code)
    log.info("%s is complete", out)


def _submission(
    folder: Path, name: str, workers: int, wishes: QueueWishes, site_file: Path | None
) -> Submission:
    """What each job asks for: one task on one node with a core for each worker."""
    site = load_site(site_file)
    said = site.model_dump() | wishes.given()
    try:
        limit = minutes(said["time"])
    except ValueError as error:
        raise RecipeError(f"--time: {error}") from error
    names = ("memory_per_node", "partition", "account", "qos", "constraint", "exclude")
    return Submission(
        run=str(folder),
        name=name,
        cpus_per_rank=workers,
        minutes=limit,
        signal_seconds=site.signal_seconds,
        setup=tuple(site.setup),
        sbatch=dict(site.sbatch),
        **{key: said[key] for key in names},
    )


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
