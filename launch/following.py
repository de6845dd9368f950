"""`launch logs` and `launch cancel`: read what a job writes, and end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from framework.errors import SchedulerError, TubeworksError
from launch import slurm
from launch.submission import attempts_of, begin_attempt, end_attempt, read_submission
from launch.submit import active_job

__all__ = ["cancel_run", "job_is_active", "log_file", "log_lines"]

LAST_BYTES = 1 << 16


def log_file(run: Path, rank: int | None) -> Path:
    """The output of a rank; with None that of the newest batch script.

    Errors:
        TubeworksError: there is none (yet).
    """
    folder = run / "logs"
    if rank is not None:
        path = folder / f"rank-{rank}.log"
    else:
        scripts = sorted(folder.glob("slurm-*.log"), key=lambda one: one.stat().st_mtime)
        path = scripts[-1] if scripts else folder / "slurm-JOB.log"
    if not path.is_file():
        there = ", ".join(sorted(one.name for one in folder.glob("*.log"))) or "nothing"
        raise TubeworksError(f"there is no {path} (yet): in that folder there is {there}")
    return path


def log_lines(path: Path, follow: bool, active: Callable[[], bool]) -> Iterator[str]:
    """The end of a log, and with `follow` what is added to it until the run is over."""
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - LAST_BYTES)
        file.seek(start)
        if start:
            file.readline()
        asked = time.monotonic()
        while True:
            data = file.read()
            if data:
                yield data.decode("utf-8", errors="replace")
                continue
            if not follow:
                return
            if time.monotonic() - asked > 5:
                asked = time.monotonic()
                if not active():
                    follow = False  # once more: it may have written since
                    continue
            time.sleep(0.3)


def job_is_active(run: Path) -> bool:
    """Whether a job works on the run or will; also where the controller cannot be asked."""
    try:
        return active_job(run) is not None
    except SchedulerError:
        return True


def cancel_run(run: Path, seconds: float = 90.0) -> str:
    """Cancel the job of a run, wait for its end, and see that MLflow says KILLED; what was done, in words.

    Errors:
        TubeworksError: the run was not submitted to Slurm.
        SchedulerError: the controller refuses, or the job does not end.
    """
    submission = read_submission(run)
    if submission.job_id is None:
        raise TubeworksError(f"{run} has no job: on this machine, end it with Ctrl-C")
    job = active_job(run)
    if job is None:
        return f"job {submission.job_id} has ended before"
    slurm.cancel(submission.job_id)  # of an array that waits, this element alone
    deadline = time.monotonic() + seconds
    while (now := active_job(run)) is not None:
        if time.monotonic() > deadline:
            raise SchedulerError(
                f"job {job.job_id} was cancelled, and is still {now.state} after {seconds:.0f} s"
            )
        time.sleep(0.3)
    _write_down(run, job)
    from framework.tracking.registration import settle_run

    settle_run(run, "KILLED")
    return f"job {job.job_id} is cancelled"


def _write_down(run: Path, job: slurm.Job) -> None:
    """Close the attempt that the job's own supervisor had no time to close, or that never began."""
    attempts = attempts_of(run)
    last = attempts[-1] if attempts else None
    if last is not None and last.cause is None:
        end_attempt(run, last, "cancelled", None)
    elif last is None or job.state == "PENDING":
        end_attempt(run, begin_attempt(run, job.job_id, job.restarts, job.nodes), "cancelled", None)
