"""`RUN/launch/`: how a run was submitted, and what became of every attempt.

RUN/launch/submission.json   what was asked of Slurm, and the job that works on the run
RUN/launch/recipe.yaml       the recipe as it was submitted
RUN/launch/attempts.jsonl    one line when an attempt begins, one when it ends
RUN/launch/stop.json         why rank 0 stopped, as far as it could find out
RUN/code/                    the code that runs
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from framework.errors import TubeworksError
from framework.files import append_line
from framework.training.checkpoint_manifest import checkpoint_folders, read_manifest
from framework.training.storage import explain_os_error, write_json

__all__ = [
    "Attempt",
    "Submission",
    "attempts_of",
    "begin_attempt",
    "end_attempt",
    "launch_folder",
    "newest_step",
    "read_stop",
    "read_submission",
    "write_stop",
    "write_submission",
]

VERSION = 1


@dataclass(frozen=True)
class Submission:
    """What a run was submitted with."""

    run: str
    name: str
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int | None = None
    memory_per_node: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    minutes: int = 60
    signal_seconds: int = 120
    max_requeues: int = 50
    max_crashes: int = 3
    container: Mapping[str, Any] | None = None
    preflight: Mapping[str, Any] = field(default_factory=dict)
    """Of the site file; empty: none."""
    environment: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, str] = field(default_factory=dict)
    srun: tuple[str, ...] = ()
    local: bool = False
    job_id: str | None = None
    """The job that works on the run; None: not submitted yet, or on this machine."""
    submitted: float = field(default_factory=time.time)
    git: Mapping[str, str] = field(default_factory=dict)
    mlflow_run: str | None = None

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run by a job; `cause` is None while it is at work."""

    number: int
    job_id: str
    restart: int
    nodes: str
    began: float
    from_step: int
    """The newest committed checkpoint when it began."""
    ended: float | None = None
    to_step: int | None = None
    """The newest committed checkpoint when it ended."""
    cause: str | None = None
    """finished, preempted, time limit, signal, stopped, cancelled, crashed, bad node, lost, or refused."""
    exit_code: int | None = None
    note: str = ""
    """What the supervisor decided, in words."""

    @property
    def progressed(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return self.to_step is not None and self.to_step > self.from_step


def launch_folder(run: Path) -> Path:
    """Where launching keeps what it knows of a run."""
    return Path(run) / "launch"


def write_submission(submission: Submission) -> None:
    """Replace `submission.json`.

    Errors:
        CheckpointError: it cannot be written.
    """
    folder = launch_folder(Path(submission.run))
    with explain_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "submission.json", {"version": VERSION, **asdict(submission)})


def read_submission(run: Path) -> Submission:
    """How a run was submitted.

    Errors:
        TubeworksError: it was not, or the file is damaged or of a later version.
    """
    path = launch_folder(run) / "submission.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if int(values.pop("version")) > VERSION:
            raise TubeworksError(f"{path} is of a later tubeworks: upgrade this one")
        found = Submission(**values)
        return replace(found, run=str(Path(run).resolve()), setup=tuple(found.setup), srun=tuple(found.srun))
    except FileNotFoundError as error:
        what = "it was not submitted with `tubeworks launch`" if run.is_dir() else "there is no such folder"
        raise TubeworksError(f"{run}: {what}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TubeworksError(f"cannot read {path}: {error}. Submit the run again") from error


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint that is whole as far as sizes tell; 0 without one."""
    for folder in reversed(checkpoint_folders(run)):
        try:
            manifest = read_manifest(folder)
            sizes = all((folder / one["name"]).stat().st_size == one["bytes"] for one in manifest["files"])
        except (TubeworksError, OSError):
            continue
        if sizes:
            return int(manifest["step"])
    return 0


def attempts_of(run: Path) -> list[Attempt]:
    """Every attempt so far, oldest first; a line that was cut by a crash counts as not written."""
    path = launch_folder(run) / "attempts.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            found.setdefault(int(entry["number"]), {}).update(entry)
        except (ValueError, KeyError, TypeError):
            continue
    return [Attempt(**values) for _, values in sorted(found.items()) if "job_id" in values]


def begin_attempt(run: Path, job_id: str, restart: int, nodes: str) -> Attempt:
    """Write down that an attempt begins; one that never said how it ended was lost with its node.

    Errors:
        CheckpointError: the run folder cannot be written.
    """
    before, step = attempts_of(run), newest_step(run)
    for open_one in (one for one in before if one.cause is None):
        cause = read_stop(run, open_one.number)[1] or "lost"
        end_attempt(run, open_one, cause, None, "nobody saw its end: its node was lost, or it was requeued")
    number = before[-1].number + 1 if before else 0
    attempt = Attempt(number, job_id, restart, nodes, time.time(), step)
    _append(
        run, {key: value for key, value in asdict(attempt).items() if value is not None and key != "note"}
    )
    return attempt


def end_attempt(run: Path, attempt: Attempt, cause: str, exit_code: int | None, note: str = "") -> Attempt:
    """Write down how an attempt ended; returns it with its end.

    Errors:
        CheckpointError: the run folder cannot be written.
    """
    ended = replace(
        attempt, ended=time.time(), to_step=newest_step(run), cause=cause, exit_code=exit_code, note=note
    )
    keys = ("number", "ended", "to_step", "cause", "exit_code", "note")
    _append(run, {key: value for key, value in asdict(ended).items() if key in keys})
    return ended


def write_stop(run: Path, number: int, cause: str | None) -> None:
    """Keep why an attempt was told to stop, for the supervisor and for the next attempt."""
    write_json(launch_folder(run) / "stop.json", {"attempt": number, "cause": cause, "time": time.time()})


def read_stop(run: Path, number: int) -> tuple[bool, str | None]:
    """Whether rank 0 of this attempt saved and stopped, and why as far as it could find out."""
    try:
        said = json.loads((launch_folder(run) / "stop.json").read_text(encoding="utf-8"))
        return (True, said["cause"]) if said["attempt"] == number else (False, None)
    except (OSError, ValueError, KeyError):
        return False, None


def _append(run: Path, entry: Mapping[str, Any]) -> None:
    path = launch_folder(run) / "attempts.jsonl"
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, json.dumps(entry))
