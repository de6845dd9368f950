"""What a run leaves behind while it trains: journal, MLflow mirror, events, pictures and the live line."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial

from framework.data.doctor import Verdict, diagnose
from framework.data.loader import Batch
from framework.errors import TubeworksError
from framework.evaluation.anatomy import PREFIX, draw_anatomy
from framework.evaluation.run import AnyResult
from framework.recipe import recipe_hash
from framework.tracking import Journal, MlflowMirror, RunInfo
from framework.tracking.mirror import Status
from framework.tracking.pictures import batch_sheet
from framework.tracking.system import SystemSampler
from framework.training.checkpoint import CheckpointReader
from framework.training.checkpoint_manifest import folder_of
from framework.training.console import LiveLine, format_seconds
from framework.training.run_folder import append_event
from framework.training.saver import Saved
from framework.training.session import Session
from framework.wording import counted

__all__ = ["Recorder"]

log = logging.getLogger(__name__)

ENDINGS: dict[Status, str] = {
    "FINISHED": "finished",
    "KILLED": "stopped",
    "FAILED": "failed",
    "RUNNING": "stopped, to go on",
}
"""What the statuses of MLflow are in plain words."""
CLOSE_SECONDS: dict[Status, float] = {"FINISHED": 60.0, "KILLED": 15.0, "FAILED": 15.0, "RUNNING": 10.0}
"""How long MLflow may take at the end; schedulers kill about 30 seconds after their signal."""


class Recorder:
    """Writes down what happens; only rank 0 does, the others pass by."""

    def __init__(self, session: Session, attempt: int) -> None:
        self._session = session
        self._began = time.perf_counter()
        self._bound = self._told = ""
        self._main = session.peers.world.is_main
        self._line = LiveLine(session.recipe.train.steps, shown=self._main)
        # Together, because a folder that cannot be written must end all ranks with the same message.
        session.peers.on_main(lambda: self._open(attempt))

    def fed(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """A step has its data: picture the first batch, write down the replaced samples of every rank."""
        events = [event for batch in micro_batches for event in batch.events]
        if self._main and step == self._session.start and micro_batches:
            batch_sheet(self._session.run, step, micro_batches[0], self._session.sources)
        if self._session.recipe.data.on_corrupt == "substitute" or self._session.loader.quarantine:
            self._replaced(step, events)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A logging point."""
        system = self._system.sample() if self._main and self._system else {}
        verdict = self._diagnose(metrics)
        of_data = {"data/cores_short": float(verdict.cores_short)}
        if memory := self._session.loader.worker_memory():
            of_data["data/worker_own_mb"] = memory / 1e6
        self._write(step, {**metrics, **of_data, **system})
        self._tell(step, verdict)
        if not self._main:
            return
        done = step - self._session.start
        pace = (time.perf_counter() - self._began) / max(1, done)
        self._line.show(step, metrics, pace * (self._session.recipe.train.steps - step))

    def _diagnose(self, metrics: Mapping[str, float]) -> Verdict:
        world, workers = self._session.peers.world, self._session.recipe.data.workers
        return diagnose(metrics, workers, world.local_size, len(os.sched_getaffinity(0)))

    def _tell(self, step: int, verdict: Verdict) -> None:
        """Say what the training waits for when that has changed and lasted for two logging points."""
        lasts = verdict.bound == self._bound
        self._bound = verdict.bound
        if self._main and lasts and verdict.bound != self._told:
            self._told = verdict.bound
            self._line.say(f"data: {verdict.text}")
            try:
                append_event(self._session.run, "doctor", step, bound=verdict.bound, verdict=verdict.text)
            except TubeworksError as error:  # of rank 0 alone: the others would wait for it
                log.warning("%s", error)

    def stopping(self, number: int) -> None:
        """A signal asked to stop."""
        self._line.say(f"{signal.Signals(number).name}: saving, then stopping")

    def saved(self, checkpoints: Sequence[Saved]) -> None:
        """Checkpoints were committed."""
        for one in checkpoints:
            times = {"checkpoint/save_s": one.seconds, "checkpoint/stall_s": one.stall}
            self._write(one.step, {**times, "checkpoint/gb": one.bytes / 1e9})
            facts = {
                "folder": one.folder.name,
                "seconds": round(one.seconds, 3),
                "stall": round(one.stall, 3),
                "bytes": one.bytes,
            }
            self._session.peers.on_main(
                partial(append_event, self._session.run, "checkpoint", one.step, **facts)
            )

    def evaluated(self, step: int, results: Mapping[str, AnyResult]) -> None:
        """The held-out samples were evaluated."""
        if not results:
            return
        metrics = {
            f"eval/{name}/{key}": value
            for name, result in results.items()
            for key, value in result.metrics().items()
        }
        self._write(step, metrics)
        for name, result in results.items():
            self._line.say(
                f"held out after step {step}: {name} {result.words()} of {counted(result.samples, 'sample')}"
            )

    def finished(self, step: int) -> None:
        """The last step is done and saved: picture what was learned."""
        if not self._main:
            return
        run = self._session.run
        try:
            reader = CheckpointReader(folder_of(run, step))
            draw_anatomy(self._session.recipe, reader.tensors(prefix=PREFIX), step, run / "pictures")
        except (OSError, TubeworksError) as error:  # a picture less must not make a whole run fail
            log.warning("the pictures of the model could not be drawn: %s", error)

    def close(self, status: Status) -> None:
        """The attempt is over: FINISHED, KILLED (stopped by a signal), FAILED, or RUNNING: another follows.

        Under a supervisor a failure does not end the run: that decides whether it is tried again.
        """
        self._line.close()
        if not self._main:
            return
        self._line.say(f"{ENDINGS[status]} after {format_seconds(time.perf_counter() - self._began)}")
        try:
            self._journal.close()
        except TubeworksError as error:
            if status != "FAILED":  # then the reason of the failure is on its way, and must not be replaced
                raise
            log.warning("%s", error)
        finally:
            supervised = self._session.supervision is not None
            self._mirror.close(
                "RUNNING" if supervised and status == "FAILED" else status, CLOSE_SECONDS[status]
            )

    def _open(self, attempt: int) -> None:
        """Begin the journal and its mirror (rank 0)."""
        session, recipe, world = self._session, self._session.recipe, self._session.peers.world
        self._journal = Journal(session.run, attempt, session.start)
        hashes = {name: opened.manifest.hash for name, opened in session.sources.items()}
        info = RunInfo(
            attempt=attempt,
            world_size=world.size,
            plan_hash=session.plan.hash,
            recipe_hash=recipe_hash(recipe),
            manifests=hashes,
            supervised=session.supervision is not None,
            tags=session.supervision.tags if session.supervision else {},
        )
        self._mirror = MlflowMirror(session.run, recipe, info)
        self._mirror.start()
        self._system = SystemSampler(session.run) if recipe.tracking.system_metrics else None
        ranks = counted(world.size, "rank")
        going_on = f", going on from step {session.start}" if session.start else ""
        self._line.say(
            f"{recipe.name} in {session.run}: {counted(recipe.train.steps, 'step')} on {ranks}{going_on}"
        )

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write to the journal; if rank 0 cannot, all ranks leave with its error."""
        self._session.peers.on_main(lambda: self._journal.write(step, metrics))

    def _replaced(self, step: int, events: list[dict[str, object]]) -> None:
        peers = self._session.peers
        if not peers.highest([len(events)])[0]:
            return
        replaced = [event for share in peers.gather(events) for event in share]

        def write() -> None:
            for event in replaced:
                append_event(self._session.run, "replaced", step, **event)

        peers.on_main(write)
