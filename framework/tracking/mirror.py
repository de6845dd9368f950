"""The MLflow mirror of a run's journal, as training and `tubeworks sync` use it.

Training hands over nothing but the end of the run: a process of its own (`framework.tracking.worker`) reads
the journal and the run folder and sends what is new. A slow or dead server therefore costs no step and no
point; what could not be sent stays in the journal for `sync_run`.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from framework.errors import TubeworksError
from framework.files import replace_text
from framework.tracking.git import git_diff, git_state, masked
from framework.tracking.journal import journal_path, read_journal
from framework.tracking.lock import RunLock
from framework.tracking.naming import parameter_value, safe_name
from framework.tracking.sender import Sender, Settings, bound_outages, load_state, reason, save_state

if TYPE_CHECKING:
    from framework.recipe.schema import Recipe

__all__ = [
    "MlflowMirror",
    "RunInfo",
    "Status",
    "SyncReport",
    "keep_settings",
    "kept_settings",
    "settings_of",
    "sync_run",
]

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED", "RUNNING"]
"""How an attempt ended; RUNNING: another attempt will go on with the run."""


@dataclass(frozen=True)
class RunInfo:
    """What the recipe does not say: which code, which data, and where this attempt runs."""

    attempt: int = 0
    """Counted from 0."""
    world_size: int = 1
    plan_hash: str = ""
    recipe_hash: str = ""
    manifests: Mapping[str, str] = field(default_factory=dict)
    """Source name -> manifest hash."""
    git: Mapping[str, str] = field(default_factory=git_state)
    host: str = field(default_factory=socket.gethostname)
    tags: Mapping[str, str] = field(default_factory=dict)
    """More, for instance the Slurm job's id."""
    supervised: bool = False
    """Whether somebody starts the run again when it is killed, and sets its status when nobody will."""


@dataclass(frozen=True)
class SyncReport:
    """What a synchronisation did."""

    run_id: str
    uri: str
    points: int
    files: int
    bytes: int
    """Of the journal, that are in MLflow now."""


class MlflowMirror:
    """Mirrors a run folder to MLflow in the background; no server makes a method raise, or wait for long.

    `close` waits at most `timeout` seconds for the last lines to be sent: by default 60, or 15 after a
    signal, when a scheduler counts the seconds. A training that ends without it (killed) is seen by the
    mirror, which sends what there is and sets the status KILLED, unless a supervisor does that.
    """

    def __init__(self, run: Path, recipe: Recipe, info: RunInfo, poll_seconds: float = 2.0) -> None:
        self.run = Path(run)
        self.enabled = recipe.tracking.mlflow
        self.settings = replace(settings_of(self.run, recipe, info), poll_seconds=poll_seconds)
        self._dirty = info.git.get("dirty") == "true"
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Begin to mirror; the process needs seconds for its first contact, this call does not."""
        if not self.enabled or self._process is not None:
            return
        try:
            self._write_files()
            self._process = _start_worker(self.run, self.settings)
        except OSError as error:
            logger.warning(
                "the MLflow mirror cannot start (%s); run `tubeworks sync %s` later", error, self.run
            )
            return
        self._reader = threading.Thread(target=_relay, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def close(self, status: Status, timeout: float | None = None) -> bool:
        """Send the rest, set the run's status and end the mirror; whether MLflow has everything."""
        process, self._process = self._process, None
        if process is None:
            return not self.enabled
        seconds = timeout if timeout is not None else 60.0 if status in ("FINISHED", "FAILED") else 15.0
        code = _end_worker(process, status, seconds)
        if self._reader is not None:
            self._reader.join(5.0)
        state = load_state(self.run)
        missing = _journal_bytes(self.run) - int(state["offset"])
        if code == 0 and missing == 0 and state["status"] == status:
            return True
        state["status"], state["status_sent"] = status, False
        try:
            save_state(self.run, state)
        except OSError as error:
            logger.warning("%s/mlflow.json cannot be written: %s", self.run, error)
        logger.warning(
            "MLflow lacks %d bytes of the journal or the end of the run: send them with `tubeworks sync %s`",
            missing,
            self.run,
        )
        return False

    def _write_files(self) -> None:
        """What `sync_run` and the artifacts need, whatever happens to this process."""
        self.run.mkdir(parents=True, exist_ok=True)
        keep_settings(self.run, self.settings)
        if self._dirty:
            attempt = self.settings.attempt
            name = "git.diff" if attempt == 0 else f"git-attempt-{attempt}.diff"
            replace_text(self.run / name, git_diff())


def settings_of(run: Path, recipe: Recipe, info: RunInfo) -> Settings:
    """What MLflow is told about a run; by default in `mlflow.db` and `mlartifacts` beside the run folder."""
    run = Path(run).resolve()
    uri, artifact_root = (recipe.tracking.uri, None) if recipe.tracking.uri else _local_store(run)
    return Settings(
        run=str(run),
        name=recipe.name if run.name == recipe.name else f"{recipe.name} ({run.name})",
        uri=uri,
        experiment=recipe.tracking.experiment,
        artifact_root=artifact_root,
        attempt=info.attempt,
        params=_parameters(recipe),
        tags=_tags(recipe, info),
        datasets=dict(info.manifests),
        supervised=info.supervised,
    )


def sync_run(run: Path, settle: bool = True) -> SyncReport:
    """Send to MLflow what it lacks of a run that is not being trained; used by `tubeworks sync`.

    With `settle` a run that MLflow still shows as running, although nobody mirrors it, gets the status that
    its training ended with, or KILLED.

    Errors:
        TubeworksError: no run folder, a training that mirrors it is still at work, or a server that does not
            answer (the message says which and why; nothing is lost, the call can be repeated).
    """
    run = Path(run).resolve()
    if not journal_path(run).is_file():
        raise TubeworksError(f"{run} has no journal.jsonl: it is not the folder of a run that has begun")
    settings = kept_settings(run)
    lock = RunLock(run)
    if not lock.acquire():
        raise TubeworksError(f"{run} is being sent by its training right now; sync it after its end")
    sender = Sender(settings)
    try:
        sender.connect(running=False)
        points, files = sender.send_points(), sender.send_files()
        if sender.state["status_sent"]:
            files += sender.send_files(("journal.jsonl",))
        elif settle:
            status = sender.state["status"]
            entries = read_journal(run)
            end = int(entries[-1].time * 1000) if entries else None
            sender.finish("KILLED" if status == "RUNNING" else status, end)
    except Exception as error:
        raise TubeworksError(
            f"MLflow at {masked(settings.uri)} did not take the run {run}: {reason(error)}. "
            "Nothing is lost: repeat `tubeworks sync` when it answers."
        ) from error
    finally:
        lock.release()
    return SyncReport(str(sender.run_id), masked(settings.uri), points, files, sender.offset)


def keep_settings(run: Path, settings: Settings) -> None:
    """Write `RUN/tracking.json`, without passwords.

    Errors:
        OSError: it cannot be written.
    """
    kept = {**asdict(settings), "uri": masked(settings.uri)}
    replace_text(run / "tracking.json", json.dumps(kept, indent=1) + "\n")


def kept_settings(run: Path) -> Settings:
    """The settings of the last attempt; the address with its password is only in the recipe."""
    from framework.recipe import load_recipe

    try:
        kept = replace(Settings.from_json((run / "tracking.json").read_text()), run=str(run))
    except (OSError, ValueError, TypeError) as error:  # never written, damaged, or by another version
        logger.debug("settings from the recipe: %s", error)
        return settings_of(run, load_recipe(str(run / "recipe.yaml")).recipe, RunInfo(git={}, host=""))
    if kept.artifact_root is not None:  # the local store moves with the folder that holds it and the runs
        uri, artifact_root = _local_store(run)
        return replace(kept, uri=uri, artifact_root=artifact_root)
    if "***@" in kept.uri:
        return replace(kept, uri=load_recipe(str(run / "recipe.yaml")).recipe.tracking.uri or kept.uri)
    return kept


def _local_store(run: Path) -> tuple[str, str]:
    """Addresses of the database and of the artifacts beside the run folder."""
    return f"sqlite:///{run.parent / 'mlflow.db'}", (run.parent / "mlartifacts").as_uri()


def _parameters(recipe: Recipe) -> dict[str, str]:
    """The recipe's values; what is no setting of the experiment stands in the note or nowhere."""
    from framework.recipe import flatten

    return {
        safe_name(key): parameter_value(value)
        for key, value in flatten(recipe).items()
        if key.split(".")[0] not in ("description", "published", "tracking")
    }


def _tags(recipe: Recipe, info: RunInfo) -> dict[str, str]:
    from framework import __version__

    tags = {
        "mlflow.note.content": _note(recipe),
        "mlflow.source.name": "tubeworks train",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "recipe": recipe.name,
        "recipe_hash": info.recipe_hash,
        "plan_hash": info.plan_hash,
        "attempt": str(info.attempt),
        "world_size": str(info.world_size),
        "host": info.host,
        "tubeworks_version": __version__,
        "mlflow.source.git.commit": info.git.get("commit", ""),
    }
    tags.update({f"git.{name}": value for name, value in info.git.items()})
    tags.update({f"manifest.{name}": value for name, value in info.manifests.items()})
    tags.update(info.tags)
    return {name: masked(value) for name, value in tags.items() if value}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _note(recipe: Recipe) -> str:
    """The description that MLflow shows above a run, with the result that it should give."""
    lines = [recipe.description.strip() or f"Recipe `{recipe.name}`."]
    if recipe.published:
        lines += ["", "| published | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in recipe.published.items()]
    return "\n".join(lines)


def _start_worker(run: Path, settings: Settings) -> subprocess.Popen[str]:
    environment = bound_outages(dict(os.environ))
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the mirror must not hold memory of an accelerator
    logs = run / "logs"
    logs.mkdir(exist_ok=True)
    with (logs / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "framework.tracking.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training, which then tells us how the run ended
        )
    assert process.stdin is not None
    process.stdin.write(settings.to_json() + "\n")
    process.stdin.flush()
    return process


def _end_worker(process: subprocess.Popen[str], status: Status, timeout: float) -> int | None:
    """Tell the process how the run ended and wait for it; None when it had to be killed."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps({"status": status, "seconds": timeout}) + "\n")
        process.stdin.close()
    except OSError as error:  # it has ended before: its exit code tells
        logger.warning("the MLflow mirror has ended early (%s); see logs/mlflow.log in the run folder", error)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _relay(messages: IO[str] | None) -> None:
    """Pass the process's messages on to our log."""
    for line in messages or ():
        try:
            message = json.loads(line)
            logger.log(int(message["level"]), "%s", message["message"])
        except (ValueError, KeyError, TypeError):
            logger.debug("the MLflow mirror says: %s", line.rstrip())


def _journal_bytes(run: Path) -> int:
    path = journal_path(run)
    return path.stat().st_size if path.is_file() else 0
