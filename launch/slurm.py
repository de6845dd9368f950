"""Slurm's commands, and nothing else: argument lists, time limits, typed answers; never a shell.

What is parsed has kept its form over many versions: `scontrol show`, and `squeue` and `sacct` with formats of
our own (`--json` changes its fields from version to version, and `scontrol` only has it since 23.02).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from framework.errors import SchedulerError
from launch.slurm_answers import ENDED, Estimate, Job, PastJob, parse_job, parse_keys, parse_past, parse_time

__all__ = [
    "ENDED",
    "Estimate",
    "Job",
    "PastJob",
    "SlurmDown",
    "SlurmMissing",
    "UnknownJob",
    "cancel",
    "configuration",
    "estimate",
    "exclude_nodes",
    "expand_nodes",
    "is_available",
    "jobs_of_user",
    "node_facts",
    "own_job_id",
    "past_jobs",
    "release",
    "requeue",
    "run",
    "set_comment",
    "show_job",
]

log = logging.getLogger(__name__)

SECONDS = 30.0
"""A controller that has not answered by then is not going to; Slurm itself tries for 9 to 18 s."""

_SEPARATOR = "\x1f"  # in no name, path or comment


class SlurmMissing(SchedulerError):
    """There is no Slurm on this machine."""


class SlurmDown(SchedulerError):
    """The controller does not answer."""


class UnknownJob(SchedulerError):
    """Slurm does not (or no longer) know the job."""


def is_available() -> bool:
    """Whether Slurm's commands are installed here."""
    return shutil.which("scontrol") is not None


def own_job_id(environment: Mapping[str, str] | None = None) -> str | None:
    """The id of the job that this process belongs to, as `24` or `24_1`; None outside of jobs."""
    environment = os.environ if environment is None else environment
    array, element = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else environment.get("SLURM_JOB_ID")


def run(*command: str, seconds: float = SECONDS) -> str:
    """Run one Slurm command and return what it prints to standard output.

    Errors:
        SlurmMissing: it is not installed.
        SlurmDown: the controller does not answer, or not in time.
        UnknownJob: it names a job that Slurm does not know.
        SchedulerError: it refuses, with Slurm's own words.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
            env=_environment(),
        )
    except FileNotFoundError as error:
        raise SlurmMissing(
            f"there is no `{command[0]}` on this machine: run this on a login node of the cluster, or use "
            "`--local` to train here without Slurm"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmDown(
            f"`{' '.join(command[:3])}` had no answer after {seconds:.0f} s: the controller is busy or down; "
            "try `scontrol ping`"
        ) from error
    if done.returncode:
        raise _failure(command, f"{done.stderr.strip()}\n{done.stdout.strip()}".strip())
    return done.stdout


def show_job(job_id: str) -> Job:
    """What the controller knows of one job, or of one element of an array.

    Errors:
        UnknownJob: it knows nothing (jobs that ended are forgotten after `MinJobAge`, often five minutes).
        SchedulerError: see `run`.
    """
    blocks = [block for block in run("scontrol", "show", "job", job_id).split("\n\n") if block.strip()]
    jobs = [parse_job(parse_keys(block)) for block in blocks]
    for job in jobs:  # an array answers with all its elements
        if job.job_id == job_id:
            return job
    return jobs[0]


def jobs_of_user(user: str | None = None, *, ended: bool = False) -> list[Job]:
    """The jobs of a user (by default of whoever asks) that wait or run, with `ended` also those that did.

    Errors:
        SchedulerError: see `run`.
    """
    whose = ["--user", user] if user else ["--me"]
    states = ["--states=all"] if ended else []
    found = []
    for job_id in dict.fromkeys(run("squeue", "--noheader", *whose, *states, "--format=%A").split()):
        try:
            found.append(show_job(job_id))
        except UnknownJob:  # it ended between the two questions, and was forgotten
            continue
    return found


def past_jobs(*job_ids: str) -> list[PastJob] | None:
    """Every attempt of these jobs (and of their arrays) in the accounting database, oldest first.

    None where there is no accounting, or where it does not answer; see `PastJob.is_of`.

    Errors:
        SlurmMissing: Slurm is not installed.
    """
    columns = ("JobID", "State", "ExitCode", "NodeList", "Start", "End", "WorkDir")
    # of whole arrays: sacct finds no element that never began
    asked = dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids)
    try:
        text = run(
            "sacct",
            "--allocations",
            "--duplicates",
            "--noheader",
            "--parsable2",
            f"--delimiter={_SEPARATOR}",
            f"--jobs={','.join(asked)}",
            f"--format={','.join(columns)}",
        )
    except SlurmMissing:
        raise
    except SchedulerError as error:
        log.debug("sacct has no answer: %s", error)
        return None
    rows = [line.split(_SEPARATOR) for line in text.splitlines()]
    return [parse_past(row) for row in rows if len(row) == len(columns) and row[1].strip()]


def cancel(job_id: str) -> None:
    """Cancel a job; one that has ended stays as it is.

    Errors:
        SchedulerError: see `run`.
    """
    run("scancel", job_id)


def requeue(job_id: str) -> None:
    """End the job now and put it back into the queue, under the same id.

    Errors:
        SchedulerError: see `run`; also where the job was submitted with `--no-requeue`.
    """
    run("scontrol", "requeue", job_id)


def release(job_id: str) -> None:
    """Let a job that is held start again.

    Errors:
        SchedulerError: see `run`.
    """
    run("scontrol", "release", job_id)


def set_comment(job_id: str, text: str) -> None:
    """Set what `squeue` and `scontrol` show as the job's comment.

    Errors:
        SchedulerError: see `run`.
    """
    run("scontrol", "update", f"JobId={job_id}", f"Comment={' '.join(text.split())[:1000]}")


def exclude_nodes(job_id: str, nodes: Sequence[str]) -> None:
    """Keep a waiting job off these nodes, beside those that it avoids already; needs no rights.

    Errors:
        SchedulerError: see `run`; also where the job is running.
    """
    before = show_job(job_id).excluded
    every = {*(expand_nodes(before) if before else ()), *nodes}
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(sorted(every))}")


def expand_nodes(nodes: str) -> list[str]:
    """The names behind Slurm's short form: `c[1-2]` is c1 and c2.

    Errors:
        SchedulerError: see `run`.
    """
    return run("scontrol", "show", "hostnames", nodes).split()


def node_facts(node: str) -> dict[str, str]:
    """What `scontrol show node` says of one node, key by key (`NodeAddr`, `State`, `Gres`, `Reason`, …).

    Errors:
        SchedulerError: see `run`.
    """
    return parse_keys(run("scontrol", "show", "node", node), free_text=("Reason", "Comment", "Extra", "OS"))


def configuration() -> dict[str, str]:
    """What `scontrol show config` says, key by key.

    Errors:
        SchedulerError: see `run`.
    """
    lines = (line.partition("=") for line in run("scontrol", "show", "config").splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in lines}


def estimate(script: Path, seconds: float = SECONDS) -> Estimate:
    """Ask Slurm when a batch script would start, without submitting it.

    Errors:
        SchedulerError: Slurm would refuse the script (the message says why), or see `run`.
    """
    command = ("sbatch", "--test-only", str(script))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=_environment()
        )
    except FileNotFoundError as error:
        raise SlurmMissing(
            "there is no `sbatch` on this machine: ask on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmDown(f"`sbatch --test-only` had no answer after {seconds:.0f} s") from error
    text = done.stderr.strip()  # that is where it answers
    if done.returncode:
        raise _failure(command, text)
    start = re.search(r"to start at (\S+)", text)
    nodes = re.search(r"on nodes (\S+)", text)
    words = text.removeprefix("sbatch: ")
    return Estimate(words, parse_time(start.group(1)) if start else None, nodes.group(1) if nodes else "")


def _environment() -> dict[str, str]:
    """The user's environment without what would change the form of answers."""
    unwanted = ("SLURM_TIME_FORMAT", "SQUEUE_FORMAT", "SQUEUE_FORMAT2", "SQUEUE_STATES", "SACCT_FORMAT")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "LC_ALL": "C", "SLURM_BITSTR_LEN": "0"}  # the second: all elements of an array


def _failure(command: Sequence[str], said: str) -> SchedulerError:
    """The error that fits what a command has said."""
    what, lines = " ".join(command[:3]), [line for line in said.splitlines() if line.strip()]
    words = "; ".join(line.strip() for line in lines[-3:]) or "it said nothing"
    if re.search(r"Unable to contact|Communication connection failure|Socket timed out", said):
        return SlurmDown(f"the Slurm controller does not answer `{what}`: {words}. Try `scontrol ping`")
    if re.search(
        r"Unable to process configuration|cannot stat file|DNS SRV lookup failed", said, re.IGNORECASE
    ):
        return SlurmMissing(
            f"Slurm's commands are here, but they find no cluster ({words}): run this on a login node, or "
            "set SLURM_CONF"
        )
    if re.search(r"Invalid job id|Job \S+ not found", said):  # the second: of an array's element
        return UnknownJob(f"Slurm does not know job {command[-1]} (any more): {words}")
    return SchedulerError(f"`{what}` failed: {words}")
