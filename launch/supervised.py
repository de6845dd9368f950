"""A rank that a supervisor started: what it tells the training, what it asks Slurm when it has to stop."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from framework.errors import PeerLost, SchedulerError, TubeworksError
from framework.training.supervision import Supervision
from framework.world import World
from launch import slurm
from launch.requeue import Cause, cause_of_stop, decide
from launch.submission import attempts_of, read_submission, write_stop

__all__ = ["VARIABLE", "exit_code_of", "supervision_of"]

log = logging.getLogger(__name__)

VARIABLE = "TUBEWORKS_SUPERVISED"
"""Set by the supervisor for its ranks, to the run folder."""


def supervision_of(run: Path, env: Mapping[str, str] | None = None) -> Supervision | None:
    """What the training must know of its supervisor; None where a person started it."""
    env = os.environ if env is None else env
    if env.get(VARIABLE) != str(run.resolve()):
        return None
    job_id = slurm.own_job_id(env)
    if job_id is None:  # on this machine: whoever sends a signal wants it to end
        return Supervision(lambda _number: _stays_stopped(run), by_people=True)
    tags = {
        "slurm.job_id": job_id,
        "slurm.nodes": env.get("SLURM_JOB_NODELIST", ""),
        "slurm.partition": env.get("SLURM_JOB_PARTITION", ""),
        "slurm.restart_count": env.get("SLURM_RESTART_COUNT", "0"),
    }
    return Supervision(lambda number: _goes_on(run, job_id, number), tags=tags)


def exit_code_of(error: TubeworksError | None, code: int, world: World, run: Path) -> int:
    """The exit code of a supervised rank under srun, which kills all ranks when one leaves with a code.

    What all ranks decided together is rank 0's to report: it writes down and sends the rest meanwhile.
    """
    if world.is_main or supervision_of(run) is None or slurm.own_job_id() is None:
        return code
    together = error is None or 1 < error.exit_code != PeerLost.exit_code
    return 0 if together else code


def _stays_stopped(run: Path) -> bool:
    history = attempts_of(run)
    if history:
        write_stop(run, history[-1].number, "cancelled")
    return False


def _goes_on(run: Path, job_id: str, number: int) -> bool:
    """Whether the job will be requeued: not when a person cancelled it, and not beyond its limits."""
    submission, history = read_submission(run), attempts_of(run)
    if not history or history[-1].cause is not None:
        return False
    try:
        cause: Cause | None = cause_of_stop(
            slurm.show_job(job_id), history[-1].restart, time.time(), submission.signal_seconds
        )
        if cause == "signal" and number == signal.SIGTERM:  # not Slurm: a person, or `launch ctl RUN stop`
            cause = "stopped"
    except SchedulerError as error:
        # inside a container there may be no scontrol: then the batch script asks
        log.info("the supervisor decides whether the run goes on: %s", error)
        cause = None
    write_stop(run, history[-1].number, cause)
    if cause is None:
        return True
    ended = replace(history[-1], cause=cause, to_step=history[-1].from_step + 1)  # it has just saved
    return decide([*history[:-1], ended], submission.max_requeues, submission.max_crashes).again
