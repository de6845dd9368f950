"""How runs are doing: from Slurm's controller, the run folder, and the accounting where there is one."""

from __future__ import annotations

import calendar
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from framework.errors import SchedulerError, TubeworksError
from framework.tracking.sender import load_state
from framework.watch.attempts import attempts_of as trainings_of
from launch import slurm
from launch.submission import Attempt, Submission, attempts_of, newest_step, read_submission
from launch.submit import works_on

__all__ = ["RunStatus", "runs_of_user", "show_list", "show_status", "status_of"]

log = logging.getLogger(__name__)

JOURNAL_TAIL = 1 << 16


@dataclass(frozen=True)
class RunStatus:
    """What is known of one run."""

    run: str
    name: str
    job_id: str | None
    state: str
    """Slurm's word where its controller or its accounting knows the job; else finished, stopped, failed,
    running (on this machine), or unknown."""
    active: bool | None
    """Whether a job works on it or waits to; None on this machine, or where there is no Slurm to ask."""
    reason: str
    """Why it waits or why it ended."""
    nodes: str
    restarts: int
    started: float | None
    """When the job's last start was, by Slurm."""
    ended: float | None
    exit_code: str
    """`code:signal` of the job when it has ended, by Slurm."""
    ends: float | None
    """When its time limit is over."""
    steps: int
    """How many the recipe wants."""
    step: int
    """The last in the journal."""
    loss: float | None
    steps_per_second: float | None
    """Over the last logging points of this attempt."""
    checkpoint: int
    """Step of the newest committed checkpoint."""
    mlflow_run: str | None
    mlflow_status: str | None
    attempts: list[Attempt]
    """The job's: what Slurm or this machine began, and why it ended."""
    trainings: list[dict[str, Any]]
    """The ranks' own, from run.json: one or more for each of the job's, none where they did not begin."""
    accounting: list[slurm.PastJob] | None
    """What sacct has of the job; None where there is no accounting, or no answer."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def status_of(run: Path) -> RunStatus:
    """What is known of a run.

    Errors:
        TubeworksError: it was never submitted, or its folder is damaged.
        SchedulerError: the controller does not answer.
    """
    submission = read_submission(run)
    return _status(run, submission, _accounting([submission]))


def _status(run: Path, submission: Submission, accounting: list[slurm.PastJob] | None) -> RunStatus:
    """What is known of a run, with the accounts of any jobs."""
    attempts = attempts_of(run)
    job, asked = _job(submission.job_id, submission.run)
    if accounting is not None:  # a counter that began again gives numbers to other jobs
        mine = (one for one in accounting if one.is_of(str(submission.job_id)))
        accounting = [one for one in mine if works_on(one, submission.run)]
    past = accounting[-1] if accounting and accounting[-1].has_ended else None
    last = attempts[-1] if attempts else None
    known = job or past
    entries = _journal_tail(run)
    losses = [entry for entry in entries if "train/loss" in entry.get("metrics", {})]
    mlflow = load_state(run) if (run / "mlflow.json").is_file() else {}
    return RunStatus(
        run=submission.run,
        name=submission.name,
        job_id=submission.job_id,
        state=known.state if known else _state_without_job(last),
        active=job is not None and not job.has_ended if asked else None,
        reason=_reason(job, past, last),
        nodes=known.nodes if known else (last.nodes if last else ""),
        restarts=job.restarts if job else (last.restart if last else 0),
        started=known.started if known else None,
        ended=_ended(job, past),
        exit_code=known.exit_code if known and known.has_ended else "",
        ends=job.ends if job and not job.has_ended else None,
        steps=_steps(run),
        step=losses[-1]["step"] if losses else 0,
        loss=losses[-1]["metrics"]["train/loss"] if losses else None,
        steps_per_second=_pace(losses),
        checkpoint=newest_step(run),
        mlflow_run=mlflow.get("run_id"),
        mlflow_status=mlflow.get("status") if mlflow.get("run_id") else None,
        attempts=attempts,
        trainings=trainings_of(run),
        accounting=accounting,
    )


def runs_of_user(folders: Sequence[Path]) -> list[RunStatus]:
    """Runs whose jobs are in the queue, and those that lie in `folders`; the latest submitted first.

    One whose folder is damaged is left out with a warning.

    Errors:
        SchedulerError: the controller does not answer.
    """
    found = {
        path.parent.parent.resolve()
        for folder in folders
        for depth in ("*", "*/*")  # the runs of a sweep lie in a folder of their own
        for path in folder.glob(f"{depth}/launch/submission.json")
    }
    if slurm.is_available():
        jobs = slurm.jobs_of_user()
        places = [Path(job.work_dir).parent for job in jobs if job.work_dir.endswith("/code")]
        found |= {place for place in places if (place / "launch" / "submission.json").is_file()}
    order = sorted(found, key=lambda run: (run / "launch" / "submission.json").stat().st_mtime, reverse=True)
    submissions: dict[Path, Submission] = {}
    statuses = []
    for run in order:
        with _left_out():
            submissions[run] = read_submission(run)
    accounting = _accounting(list(submissions.values()))  # one question for all
    for run, submission in submissions.items():
        with _left_out():
            statuses.append(_status(run, submission, accounting))
    return statuses


@contextmanager
def _left_out() -> Iterator[None]:
    """One damaged folder must not hide the others."""
    try:
        yield
    except SchedulerError:
        raise
    except TubeworksError as error:
        log.warning("left out: %s", error)


def show_status(status: RunStatus) -> str:
    """A few lines for a person."""
    where = f" on {status.nodes}" if status.nodes else ""
    job = f"job {status.job_id}" if status.job_id else "on this machine"
    lines = [f"{status.name}  {status.run}", f"  {job}: {status.state}{where}"]
    if status.reason:
        lines.append(f"  {status.reason}")
    if status.ended is not None:
        began = f"began {_clock(status.started)}, " if status.started is not None else ""
        lines.append(f"  {began}ended {_clock(status.ended)}, exit code {status.exit_code}")
    pace = f", {status.steps_per_second:.3g} steps/s" if status.steps_per_second else ""
    loss = f", loss {status.loss:.4f}" if status.loss is not None else ""
    lines.append(
        f"  step {status.step} of {status.steps}{loss}{pace}; newest checkpoint: step {status.checkpoint}"
    )
    if status.steps_per_second and status.state == "RUNNING":
        left = (status.steps - status.step) / status.steps_per_second
        limit = f"; its time limit ends {_clock(status.ends)}" if status.ends else ""
        lines.append(f"  done about {_clock(time.time() + left)}{limit}")
    if status.mlflow_run:
        lines.append(f"  MLflow run {status.mlflow_run}: {status.mlflow_status}")
    return "\n".join([*lines, *_attempt_lines(status)])


def _attempt_lines(status: RunStatus) -> list[str]:
    """The attempts of jobs, and under each what its ranks say of themselves."""
    by_job: dict[int, list[str]] = {}
    for training in status.trainings:
        # whole seconds: an attempt of the job begins before its ranks do
        started = calendar.timegm(time.strptime(training["started"], "%Y-%m-%dT%H:%M:%SZ")) + 1
        number = max((one.number for one in status.attempts if one.began <= started), default=-1)
        to_step = f" to {training['end_step']}" if "end_step" in training else ""
        accused = f", accused: rank {', '.join(training['accused'])}" if training.get("accused") else ""
        end = training.get("cause", "no end yet")
        line = f"    ranks: from step {training['start_step']}{to_step}: {end}{accused}"
        by_job.setdefault(number, []).append(line)
    lines = by_job.get(-1, [])  # of a training that was not submitted
    for attempt in status.attempts:
        end = attempt.cause or ("nobody saw its end" if status.active is False else "at work")
        to_step = f" to {attempt.to_step}" if attempt.to_step is not None else ""
        note = f" ({attempt.note})" if attempt.note else ""
        lines.append(
            f"  attempt {attempt.number}: {_clock(attempt.began)} on {attempt.nodes}, from checkpoint "
            f"{attempt.from_step}{to_step}: {end}{note}"
        )
        lines += by_job.get(attempt.number, [])
    return lines


def show_list(found: Sequence[RunStatus]) -> str:
    """One line per run."""
    rows = [("job", "state", "step", "checkpoint", "restarts", "run")]
    for status in found:
        step = f"{status.step}/{status.steps}"
        rows.append(
            (
                status.job_id or "-",
                status.state,
                step,
                str(status.checkpoint),
                str(status.restarts),
                status.run,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def _job(job_id: str | None, run: str) -> tuple[slurm.Job | None, bool]:
    """The job as the controller knows it, None once it is forgotten; and whether it could be asked."""
    if job_id is None:
        return None, False
    try:
        job = slurm.show_job(job_id)
    except slurm.UnknownJob:
        return None, True
    except slurm.SlurmMissing:
        return None, False
    return (job if works_on(job, run) else None), True


def _state_without_job(last: Attempt | None) -> str:
    if last is None:
        return "unknown"
    if last.cause is None:
        return "running"
    return {"finished": "finished", "crashed": "failed", "refused": "failed", "lost": "unknown"}.get(
        last.cause, "stopped"
    )


def _ended(job: slurm.Job | None, past: slurm.PastJob | None) -> float | None:
    if job is not None:
        return job.ends if job.has_ended else None
    return past.ended if past else None


def _reason(job: slurm.Job | None, past: slurm.PastJob | None, last: Attempt | None) -> str:
    if job is not None and job.comment:
        return job.comment.removeprefix("tubeworks: ")
    if job is not None and job.state == "PENDING":
        return f"waits: {job.reason}" if job.reason else "waits"
    if past is not None and past.cancelled_by and (job is None or job.has_ended):
        return f"cancelled by {past.cancelled_by}"
    if last is not None and last.cause not in (None, "finished"):
        return f"{last.cause}: {last.note}" if last.note else str(last.cause)
    return ""


def _accounting(submissions: Sequence[Submission]) -> list[slurm.PastJob] | None:
    """What sacct has of the jobs of these runs; None where it cannot be asked."""
    job_ids = [one.job_id for one in submissions if one.job_id is not None]
    try:
        return slurm.past_jobs(*job_ids) if job_ids else None
    except slurm.SlurmMissing:
        return None


def _steps(run: Path) -> int:
    from framework.recipe import load_recipe

    for path in (run / "launch" / "recipe.yaml", run / "recipe.yaml"):
        if path.is_file():
            return load_recipe(str(path)).recipe.train.steps
    raise TubeworksError(
        f"{run} has no recipe.yaml: restore it, or submit the recipe to another --run folder"
    )


def _journal_tail(run: Path) -> list[dict[str, Any]]:
    """The last whole lines of the journal."""
    path = run / "journal.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - JOURNAL_TAIL)
        file.seek(start)
        lines = file.read().splitlines()[1 if start else 0 :]
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:  # being written
            continue
    return entries


def _pace(losses: Sequence[dict[str, Any]]) -> float | None:
    recent = [entry for entry in losses[-20:] if entry.get("attempt") == losses[-1].get("attempt")]
    if len(recent) < 2 or recent[-1]["time"] <= recent[0]["time"]:
        return None
    return (recent[-1]["step"] - recent[0]["step"]) / (recent[-1]["time"] - recent[0]["time"])


def _clock(when: float) -> str:
    pattern = "%H:%M:%S" if abs(when - time.time()) < 43_200 else "%Y-%m-%d %H:%M"
    return time.strftime(pattern, time.localtime(when))
