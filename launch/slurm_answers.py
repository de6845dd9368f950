"""What Slurm's commands answer, as values."""

from __future__ import annotations

import pwd
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "ENDED",
    "Estimate",
    "Job",
    "PastJob",
    "parse_job",
    "parse_keys",
    "parse_limit",
    "parse_past",
    "parse_time",
]

ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States from which a job does not come back by itself."""

FREE_TEXT = ("AdminComment", "Command", "Comment", "StdErr", "StdIn", "StdOut", "SystemComment", "WorkDir")
"""Keys of `scontrol show job` whose values may hold spaces; each has a line of its own."""
NOTHING = {"", "(null)", "None", "N/A", "Unknown", "UNLIMITED"}


@dataclass(frozen=True)
class Job:
    """A job as the controller knows it; times are seconds since the epoch, None where there is none yet."""

    job_id: str
    """`24`, or `24_1` for an element of an array."""
    name: str
    state: str
    """PENDING, RUNNING, COMPLETING, … or one of `ENDED`."""
    reason: str
    """Why it waits, in Slurm's word."""
    partition: str
    nodes: str
    """In Slurm's short form: `c[1-2]`."""
    node_count: int
    restarts: int
    requeues: bool
    """Whether Slurm may put it back into the queue."""
    submitted: float | None
    started: float | None
    ends: float | None
    """End of a job that has ended; of another, when its time limit is over."""
    limit: float | None
    """Its time limit in seconds; None where it has none."""
    preempted: float | None
    """When Slurm decided to take its nodes away; None unless that is why it has to leave."""
    excluded: str
    work_dir: str
    comment: str
    exit_code: str
    """`code:signal` of the batch script."""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED


@dataclass(frozen=True)
class PastJob:
    """One attempt of a job in the accounting database."""

    job_id: str
    state: str
    cancelled_by: str
    """The user who cancelled it; empty where nobody did."""
    exit_code: str
    """`code:signal` of the batch script."""
    nodes: str
    started: float | None
    ended: float | None
    work_dir: str

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED

    def is_of(self, job_id: str) -> bool:
        """Whether it is this job; elements of an array that never began are one, `24_[0,2-8:2%4]`."""
        array, _, elements = self.job_id.partition("_[")
        wanted, _, element = job_id.partition("_")
        if not elements or wanted != array or not element.isdigit():
            return self.job_id == job_id
        for part in elements.rstrip("]").partition("%")[0].split(","):
            found = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
            if found is not None:
                first, last, step = found.groups()
                if int(element) in range(int(first), int(last or first) + 1, int(step or 1)):
                    return True
        return False


@dataclass(frozen=True)
class Estimate:
    """What `sbatch --test-only` answers: Slurm's own words, and when and where the job would start."""

    text: str
    start: float | None
    nodes: str


def parse_keys(block: str, free_text: Sequence[str] = FREE_TEXT) -> dict[str, str]:
    """The `Key=value` pairs of one `scontrol show` block."""
    keys: dict[str, str] = {}
    for line in block.splitlines():
        line = line.strip()
        key, equals, value = line.partition("=")
        if equals and key in free_text:
            keys[key] = value
            continue
        for word in line.split():
            name, equals, value = word.partition("=")
            if equals:
                keys[name] = value
    return keys


def parse_job(keys: Mapping[str, str]) -> Job:
    """A job from the keys of `scontrol show job`; an element of an array has the number that users know."""

    def said(key: str) -> str:
        value = keys.get(key, "")
        return "" if value in NOTHING else value

    element = said("ArrayTaskId")
    return Job(
        job_id=f"{said('ArrayJobId')}_{element}" if element.isdigit() else said("JobId"),
        name=said("JobName"),
        state=said("JobState"),
        reason=said("Reason"),
        partition=said("Partition"),
        nodes=said("NodeList"),
        node_count=int(said("NumNodes").partition("-")[0] or 0),  # `2-4` while it waits for 2 to 4
        restarts=int(said("Restarts") or 0),
        requeues=said("Requeue") == "1",
        submitted=parse_time(said("SubmitTime")),
        started=parse_time(said("StartTime")),
        ends=parse_time(said("EndTime")),
        limit=parse_limit(said("TimeLimit")),
        preempted=parse_time(said("PreemptTime")),
        excluded=said("ExcNodeList"),
        work_dir=said("WorkDir"),
        comment=said("Comment"),
        exit_code=said("ExitCode"),
    )


def parse_past(cells: Sequence[str]) -> PastJob:
    """A row of `sacct --format=JobID,State,ExitCode,NodeList,Start,End,WorkDir`."""
    job_id, said, exit_code, nodes, started, ended, work_dir = cells
    state, _, user = said.partition(" by ")
    return PastJob(
        job_id=job_id,
        state=state.split()[0],
        cancelled_by=_user_name(user.strip()),
        exit_code=exit_code,
        nodes="" if nodes == "None assigned" else nodes,
        started=parse_time(started),
        ended=parse_time(ended),
        work_dir=work_dir,
    )


def _user_name(uid: str) -> str:
    """The name of a user whose number Slurm tells; the number where this machine does not know it."""
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (ValueError, KeyError):
        return uid


def parse_time(text: str) -> float | None:
    """Seconds since the epoch of Slurm's `2026-11-20T18:06:07`, which is local time."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def parse_limit(text: str) -> float | None:
    """Seconds of Slurm's `1-02:30:00` or `30:00`; None for UNLIMITED and the like."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or len(parts) > 3 or (days and not days.isdigit()):
        return None
    hours, minutes, seconds = [0] * (3 - len(parts)) + [int(part) for part in parts]
    return float(int(days or 0) * 86_400 + hours * 3_600 + minutes * 60 + seconds)
