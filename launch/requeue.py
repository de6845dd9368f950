"""Why an attempt ended, and whether the run starts again: functions of what Slurm and the run folder say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from framework.errors import RecipeError, TrainingStopped
from framework.tracking.mirror import Status
from launch.slurm import Job
from launch.submission import Attempt

__all__ = ["Cause", "Decision", "cause_of_stop", "decide", "stopped_by_guard"]

Cause = Literal[
    "finished",
    "preempted",
    "time limit",
    "signal",
    "stopped",
    "cancelled",
    "crashed",
    "bad node",
    "lost",
    "refused",
]
"""`refused`: the ranks said that trying again is no use. `signal`: somebody asked to save and go on;
`stopped`: to save and stay away. `bad node`: one failed its pre-flight, and is avoided now."""

EARLY_SECONDS = 90.0
"""Slurm looks at time limits every half minute, and may send its warning a minute early."""
FINAL_CODES = (RecipeError.exit_code, TrainingStopped.exit_code)
"""Exit codes of what happens again however often it is tried."""
NOT_COUNTED = ("preempted", "cancelled", "stopped", "finished", "bad node")
"""Causes that are no fault of the run."""


@dataclass(frozen=True)
class Decision:
    """Whether the run starts again, why, and what MLflow is told where it does not."""

    again: bool
    reason: str
    status: Status


def cause_of_stop(job: Job, restart: int, now: float, signal_seconds: float) -> Cause:
    """Why a job that was told to stop has to, by what the controller says at that moment.

    Seen on Slurm 22.05: at a preemption the job is RUNNING with a PreemptTime; after `scancel` it is
    COMPLETING without one; after the loss of a node or `scontrol requeue` it is COMPLETING too, but its
    restarts are counted already; before its time limit it is RUNNING, and its end is near.

    Args:
        restart: the job's restarts when this attempt began.
    """
    if job.preempted is not None:
        return "preempted"
    if job.restarts > restart:
        return "lost"
    if job.state not in ("RUNNING", "SUSPENDED", "STOPPED"):
        if job.limit and job.started and job.ends and job.ends - job.started >= job.limit - 2:
            return "time limit"  # nobody left in time: Slurm has begun to kill
        return "cancelled" if job.state in ("CANCELLED", "COMPLETING") else "signal"
    if job.ends is not None and job.ends - now <= signal_seconds + EARLY_SECONDS:
        return "time limit"
    return "signal"


def stopped_by_guard(history: Sequence[Attempt], max_crashes: int) -> str | None:
    """Why the crash-loop guard stops the run: too many attempts in a row without a newer checkpoint; or None.

    Only attempts of the last job count: a person who submits again has changed something.
    """
    in_vain: list[Attempt] = []
    for attempt in reversed(history):
        if attempt.job_id != history[-1].job_id or attempt.cause is None or attempt.progressed:
            break
        if attempt.cause not in NOT_COUNTED:
            in_vain.append(attempt)
    if len(in_vain) < max_crashes:
        return None
    last = in_vain[0]
    why = f": {last.note}" if last.note else f", exit code {last.exit_code}" if last.exit_code else ""
    return (
        f"{len(in_vain)} attempts in a row left no checkpoint newer than step {last.from_step}; "
        f"the last {last.cause}{why}"
    )


def decide(history: Sequence[Attempt], max_requeues: int, max_crashes: int) -> Decision:
    """What happens after the last attempt of `history`, which has ended."""
    last = history[-1]
    if last.cause == "finished":
        return Decision(False, "finished", "FINISHED")
    if last.cause == "cancelled":
        return Decision(False, "cancelled", "KILLED")
    if last.cause == "stopped":
        return Decision(False, "somebody asked it to stop. Go on with `tubeworks launch resubmit`", "KILLED")
    if last.cause == "refused":
        return Decision(
            False, f"trying again is no use: {last.note or f'exit code {last.exit_code}'}", "FAILED"
        )
    guard = stopped_by_guard(history, max_crashes)
    if guard is not None:
        return Decision(False, f"stopped by the crash-loop guard: {guard}", "FAILED")
    if last.cause in ("preempted", "bad node"):  # there are only so many nodes that can be bad
        return Decision(True, f"{last.cause}: {last.note}" if last.note else last.cause, "RUNNING")
    counted = [one for one in history if one.job_id == last.job_id and one.cause not in NOT_COUNTED]
    if len(counted) > max_requeues:
        status: Status = "FAILED" if last.cause in ("crashed", "lost") else "KILLED"
        return Decision(
            False,
            f"{last.cause}; not requeued again: it was {max_requeues} times, which is the limit "
            "(max_requeues). Go on with `tubeworks launch resubmit`",
            status,
        )
    return Decision(True, str(last.cause), "RUNNING")
