"""Sends a run folder to an MLflow server: points by byte offset of the journal, and files when they change.

How a point comes to be in MLflow exactly once, whatever is killed when:
 - A point's name, step, value and time all come from its line of the journal, and MLflow's database has one
   row per such point, so that sending a line again (a lost answer, a retry, two senders) changes nothing.
 - The offset behind the last line travels as a tag in the same `log_batch` call, and MLflow writes tags
   after metrics. A sender that starts reads the tag: it is never ahead of the points.
 - The MLflow run carries the random id of the run folder as a tag, so that one whose creation was answered
   too late is found again instead of made twice.
Steps that a resumed attempt replays are in MLflow once per attempt (MLflow cannot take points back);
`train/attempt` beside them tells which. `framework.tracking.journal.read_journal` drops the replayed ones.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.errors import TubeworksError
from framework.files import replace_text
from framework.tracking.git import masked
from framework.tracking.journal import Entry, complete_lines, journal_path, parse_line
from framework.tracking.naming import safe_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["Batch", "Sender", "Settings", "batches", "bound_outages", "load_state", "reason", "save_state"]

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 18
POINTS_PER_CALL = 800  # MLflow takes 1000 metrics and tags, and a megabyte, in one call
OFFSET_TAG = "tubeworks.offset"
ID_TAG = "tubeworks.id"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Model training, which is not what MLflow takes for granted."""
ATTEMPT_TAGS = ("host", "world_size", "git.commit", "git.dirty", "slurm.job_id", "slurm.nodes")
"""What is kept of every later attempt; the tags of these names are those of the last one."""
ARTIFACTS = (
    "recipe.yaml",
    "run.json",
    "git*.diff",
    "pictures/*.png",
    "evaluations/*.json",
    "postmortem/*",
    "profiles/*",
)


@dataclass(frozen=True)
class Settings:
    """What the MLflow run of a run folder should say; plain values, so that it can go through a pipe."""

    run: str
    """The run folder."""
    name: str
    """What MLflow calls the run."""
    uri: str
    experiment: str
    artifact_root: str | None = None
    """Where artifacts of a new experiment lie; None: the server decides."""
    attempt: int = 0
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)
    """Source name -> manifest hash."""
    poll_seconds: float = 2.0
    """How often a mirror looks for new lines."""
    supervised: bool = False
    """Whether somebody else sets the status of a run that was killed: it may go on."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Batch:
    """Points (name, value, milliseconds, step) for one call, and the offset behind the last line they end."""

    points: list[tuple[str, float, int, int]]
    tags: dict[str, str]
    offset: int | None


def bound_outages(environment: dict[str, str]) -> dict[str, str]:
    """The environment with short MLflow time-outs where the user set none; MLflow's own add up to 248 s."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {**defaults, **environment}


def load_state(run: Path) -> dict[str, Any]:
    """What `RUN/mlflow.json` remembers, with a fresh id where there is none."""
    path = Path(run) / "mlflow.json"
    if path.is_file():
        try:
            state = json.loads(path.read_text())
            if isinstance(state, dict) and state.get("id"):
                return state
        except ValueError as error:
            logger.warning("%s is damaged (%s): everything goes to a new MLflow run", path, error)
    fresh = {"run_id": None, "offset": 0, "files": {}, "status": "RUNNING", "status_sent": False}
    return {"version": 1, "id": uuid.uuid4().hex, **fresh}


def save_state(run: Path, state: Mapping[str, Any]) -> None:
    """Write `RUN/mlflow.json` so that a reader sees the old or the new one."""
    path = Path(run) / "mlflow.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(state, indent=1) + "\n")


def batches(lines: list[bytes], offset: int) -> Iterator[Batch]:
    """Cut lines that begin at byte `offset` into calls; a line's last points carry the offset behind it."""
    points: list[tuple[str, float, int, int]] = []
    tags: dict[str, str] = {}
    for line in lines:
        entry = parse_line(line)
        if entry is not None:
            points.extend(points_of(entry))
            if entry.nonfinite:
                tags["train.nonfinite"] = f"step {entry.step}: {', '.join(entry.nonfinite)}"[:5000]
        while len(points) > POINTS_PER_CALL:
            yield Batch(points[:POINTS_PER_CALL], {}, None)
            points = points[POINTS_PER_CALL:]
        offset += len(line)
        if len(points) > POINTS_PER_CALL // 2:
            yield Batch(points, tags, offset)
            points, tags = [], {}
    yield Batch(points, tags, offset)


def points_of(entry: Entry) -> list[tuple[str, float, int, int]]:
    """The points of a line: finite metrics, how many are not finite, and which attempt if not the first."""
    metrics = {name: value for name, value in entry.metrics.items() if value is not None}
    if entry.nonfinite:
        metrics["train/nonfinite"] = float(len(entry.nonfinite))
    if entry.attempt > 0 and any(name.startswith("train/") for name in metrics):
        metrics["train/attempt"] = float(entry.attempt)
    milliseconds = int(entry.time * 1000)
    return [(safe_name(name), value, milliseconds, entry.step) for name, value in metrics.items()]


def reason(error: BaseException) -> str:
    """Why a server did not do what it was asked, in one line without passwords.

    MLflow and its HTTP library wrap what the operating system said several times; that alone is told.
    """
    innermost = error
    while (cause := innermost.__cause__ or innermost.__context__) is not None:
        innermost = cause
    told = innermost if isinstance(innermost, OSError) else error
    return masked(" ".join(str(told).split()))[:300] or type(told).__name__


class Sender:
    """Brings the MLflow run of one run folder up to date; every method may raise, and may be called again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.run = Path(settings.run)
        self.state = load_state(self.run)
        self._client: MlflowClient | None = None

    @property
    def offset(self) -> int:
        """Bytes of the journal that are in MLflow."""
        return int(self.state["offset"])

    def journal_bytes(self) -> int:
        """Bytes of the journal so far; 0 where there is none."""
        path = journal_path(self.run)
        return path.stat().st_size if path.is_file() else 0

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there has been contact."""
        return self.state["run_id"]

    def connect(self, running: bool = True) -> None:
        """Find or make the MLflow run, tell it this attempt's parameters and tags, ask it for the offset."""
        if self._client is not None:
            return
        os.environ.update(bound_outages(dict(os.environ)))
        from mlflow import MlflowClient

        self.state = load_state(self.run)  # an earlier attempt's mirror may have been the last to write it
        client = MlflowClient(tracking_uri=self.settings.uri)
        run = self._existing_run(client) or self._new_run(client)
        self.state["run_id"] = run.info.run_id
        self.state["experiment_id"] = run.info.experiment_id
        self.state["offset"] = _offset_of(run, journal_path(self.run))
        self._describe(client, run)
        if running:
            client.update_run(run.info.run_id, status="RUNNING")
            self.state.update(status="RUNNING", status_sent=False)
        save_state(self.run, self.state)
        self._client = client

    def disconnect(self) -> None:
        """Forget the contact, so that the next call looks for the MLflow run anew."""
        self._client = None

    def send_points(self, after_call: Callable[[float], object] = lambda seconds: None) -> int:
        """Send every whole line of the journal that MLflow does not have; the number of points.

        After each call to the server, `after_call` is told how many seconds it took; it may wait.
        """
        from mlflow.entities import Metric, RunTag

        client, run_id = self._contact()
        path = journal_path(self.run)
        sent = 0
        while path.is_file():
            lines, _ = complete_lines(path, self.offset, READ_BYTES)
            if not lines:
                break
            for batch in batches(lines, self.offset):
                tags = dict(batch.tags)
                if batch.offset is not None:
                    tags[OFFSET_TAG] = str(batch.offset)
                began = time.monotonic()
                client.log_batch(
                    run_id,
                    metrics=[Metric(name, value, time, step) for name, value, time, step in batch.points],
                    tags=[RunTag(key, value) for key, value in tags.items()],
                    synchronous=True,  # whatever the user's environment says of asynchronous logging
                )
                sent += len(batch.points)
                if batch.offset is not None:
                    self.state["offset"] = batch.offset
                after_call(time.monotonic() - began)
            save_state(self.run, self.state)
        return sent

    def send_files(self, patterns: tuple[str, ...] = ARTIFACTS) -> int:
        """Upload the files of the run folder that are new or changed; the number of files."""
        client, run_id = self._contact()
        sent = 0
        for path in sorted(path for pattern in patterns for path in self.run.glob(pattern)):
            status = path.stat()
            name, mark = path.relative_to(self.run).as_posix(), [status.st_mtime_ns, status.st_size]
            if self.state["files"].get(name) == mark:
                continue
            folder = path.parent.relative_to(self.run).as_posix()
            _upload(client, run_id, path, None if folder == "." else folder)
            self.state["files"][name] = mark
            save_state(self.run, self.state)
            sent += 1
        return sent

    def mark(self, status: str) -> None:
        """Set a status that is not the end: SCHEDULED."""
        client, run_id = self._contact()
        client.update_run(run_id, status=status)

    def finish(self, status: str, milliseconds: int | None = None) -> None:
        """Upload the journal and set how the run ended: FINISHED, FAILED or KILLED."""
        client, run_id = self._contact()
        self.send_files(("journal.jsonl",))
        client.set_terminated(run_id, status, milliseconds)
        self.state.update(status=status, status_sent=True)
        save_state(self.run, self.state)

    def _contact(self) -> tuple[MlflowClient, str]:
        if self._client is None or self.run_id is None:
            raise RuntimeError("connect() comes first")
        return self._client, self.run_id

    def _existing_run(self, client: MlflowClient) -> Run | None:
        """The MLflow run that this folder already has; None where it is gone or was never made."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            experiment = client.get_experiment_by_name(self.settings.experiment)
            if experiment is None:
                return None
            found = client.search_runs([experiment.experiment_id], f"tags.`{ID_TAG}` = '{self.state['id']}'")
            return found[0] if found else None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is not None and run.info.lifecycle_stage == "active":
            return run
        logger.warning("MLflow no longer has run %s: everything is sent again as a new run", self.run_id)
        self.state.update(id=uuid.uuid4().hex, run_id=None, offset=0, files={})
        return None

    def _new_run(self, client: MlflowClient) -> Run:
        save_state(self.run, self.state)  # the id must be on disk before the server knows it
        path = journal_path(self.run)
        lines = complete_lines(path, 0, 1)[0] if path.is_file() else []
        first = parse_line(lines[0]) if lines else None
        return client.create_run(
            self._experiment(client),
            start_time=int(first.time * 1000) if first else None,
            tags={ID_TAG: self.state["id"]},
            run_name=self.settings.name,
        )

    def _experiment(self, client: MlflowClient) -> str:
        """The id of the experiment, made where there is none."""
        from mlflow.exceptions import MlflowException

        name = self.settings.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return client.create_experiment(name, self.settings.artifact_root, EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)  # another run was faster
        if experiment is None or experiment.lifecycle_stage != "active":
            raise TubeworksError(
                f"the experiment `{name}` was deleted there: restore it (`mlflow experiments restore`) or "
                "choose another tracking.experiment"
            )
        return experiment.experiment_id

    def _describe(self, client: MlflowClient, run: Run) -> None:
        """Parameters once; what a later attempt changed goes to tags: a parameter in MLflow never changes."""
        from mlflow.entities import Param, RunTag

        known, prefix = run.data.params, f"attempt.{self.settings.attempt}."
        new = {name: value for name, value in self.settings.params.items() if name not in known}
        tags = dict(self.settings.tags)
        if self.settings.attempt > 0:
            tags.update({prefix + name: tags[name] for name in ATTEMPT_TAGS if name in tags})
            changed = {n: v for n, v in self.settings.params.items() if known.get(n, v) != v}
            tags.update({safe_name(prefix + name): value for name, value in changed.items()})
        tags = {name: value for name, value in tags.items() if run.data.tags.get(name) != value}
        client.log_batch(
            run.info.run_id,
            params=[Param(name, value) for name, value in new.items()],
            tags=[RunTag(name, value[:5000]) for name, value in tags.items()],
            synchronous=True,
        )
        if self.settings.datasets:
            client.log_inputs(run.info.run_id, datasets=_dataset_inputs(self.settings.datasets))


def _upload(client: MlflowClient, run_id: str, path: Path, folder: str | None) -> None:
    """Upload a file; of a text that holds passwords in addresses, a copy without them."""
    if path.suffix in (".yaml", ".diff"):
        text = path.read_text(errors="replace")
        if masked(text) != text:
            with tempfile.TemporaryDirectory() as temporary:
                copy = Path(temporary) / path.name
                copy.write_text(masked(text))
                client.log_artifact(run_id, str(copy), folder)
            return
    client.log_artifact(run_id, str(path), folder)


def _offset_of(run: Run, journal: Path) -> int:
    """The offset that the server has; 0 when the journal is shorter, which is then another one."""
    text = run.data.tags.get(OFFSET_TAG, "0")
    offset = int(text) if text.isdigit() else 0
    size = journal.stat().st_size if journal.is_file() else 0
    return offset if offset <= size else 0


def _dataset_inputs(datasets: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=name, digest=digest[:36], source_type="local", source=json.dumps({"manifest": digest})
            ),
            tags=[InputTag("mlflow.data.context", "training")],
        )
        for name, digest in datasets.items()
    ]
