"""How runs are doing: from Slurm's controller, the run folder, and the accounting where there is one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from framework.errors import SchedulerError, TubeworksError
from framework.tracking.sender import load_state
from launch import slurm
from launch.submission import Attempt, attempts_of, newest_step, read_submission
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
    """Slurm's word while it knows the job; else finished, stopped, failed, or unknown."""
    reason: str
    """Why it waits or why it ended."""
    nodes: str
    restarts: int
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
    accounting: list[slurm.PastJob] | None
    """What sacct has; None where there is no accounting."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def status_of(run: Path) -> RunStatus:
    """What is known of a run.

    Errors:
        TubeworksError: it was never submitted, or its folder is damaged.
        SchedulerError: the controller does not answer.
    """
    submission, attempts = read_submission(run), attempts_of(run)
    job = _job(submission.job_id, submission.run)
    last = attempts[-1] if attempts else None
    entries = _journal_tail(run)
    losses = [entry for entry in entries if "train/loss" in entry.get("metrics", {})]
    mlflow = load_state(run) if (run / "mlflow.json").is_file() else {}
    return RunStatus(
        run=submission.run,
        name=submission.name,
        job_id=submission.job_id,
        state=job.state if job else _state_without_job(last),
        reason=_reason(job, last),
        nodes=job.nodes if job else (last.nodes if last else ""),
        restarts=job.restarts if job else (last.restart if last else 0),
        ends=job.ends if job and not job.has_ended else None,
        steps=_steps(run),
        step=losses[-1]["step"] if losses else 0,
        loss=losses[-1]["metrics"]["train/loss"] if losses else None,
        steps_per_second=_pace(losses),
        checkpoint=newest_step(run),
        mlflow_run=mlflow.get("run_id"),
        mlflow_status=mlflow.get("status") if mlflow.get("run_id") else None,
        attempts=attempts,
        accounting=_accounting(submission.job_id),
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
    statuses = []
    for run in order:
        try:
            statuses.append(status_of(run))
        except SchedulerError:
            raise
        except TubeworksError as error:  # one damaged folder must not hide the others
            log.warning("left out: %s", error)
    return statuses


def show_status(status: RunStatus) -> str:
    """A few lines for a person."""
    where = f" on {status.nodes}" if status.nodes else ""
    job = f"job {status.job_id}" if status.job_id else "on this machine"
    lines = [f"{status.name}  {status.run}", f"  {job}: {status.state}{where}"]
    if status.reason:
        lines.append(f"  {status.reason}")
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
    for attempt in status.attempts:
        end = attempt.cause or "at work"
        to_step = f" to {attempt.to_step}" if attempt.to_step is not None else ""
        note = f" ({attempt.note})" if attempt.note else ""
        lines.append(
            f"  attempt {attempt.number}: {_clock(attempt.began)} on {attempt.nodes}, from step "
            f"{attempt.from_step}{to_step}: {end}{note}"
        )
    return "\n".join(lines)


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


def _job(job_id: str | None, run: str) -> slurm.Job | None:
    """The job as the controller knows it; None once it is forgotten."""
    if job_id is None:
        return None
    try:
        job = slurm.show_job(job_id)
    except (slurm.UnknownJob, slurm.SlurmMissing):
        return None
    return job if works_on(job, run) else None


def _state_without_job(last: Attempt | None) -> str:
    if last is None:
        return "unknown"
    if last.cause is None:
        return "running"
    return {"finished": "finished", "crashed": "failed", "refused": "failed", "lost": "unknown"}.get(
        last.cause, "stopped"
    )


def _reason(job: slurm.Job | None, last: Attempt | None) -> str:
    if job is not None and job.comment:
        return job.comment.removeprefix("tubeworks: ")
    if job is not None and job.state == "PENDING":
        return f"waits: {job.reason}" if job.reason else "waits"
    if last is not None and last.cause not in (None, "finished"):
        return f"{last.cause}: {last.note}" if last.note else str(last.cause)
    return ""


def _accounting(job_id: str | None) -> list[slurm.PastJob] | None:
    if job_id is None:
        return None
    try:
        return slurm.past_jobs(job_id)
    except SchedulerError:
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
