"""What a run leaves behind while it trains: journal, MLflow mirror, events, pictures and the live line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from framework.data.loader import Batch
from framework.evaluation.run import SourceResult
from framework.recipe import recipe_hash
from framework.tracking import Journal, MlflowMirror, RunInfo
from framework.tracking.mirror import Status
from framework.tracking.pictures import batch_sheet
from framework.training.console import LiveLine, format_seconds
from framework.training.run_folder import append_event
from framework.training.session import Session

__all__ = ["Recorder"]


class Recorder:
    """Writes down what happens; only rank 0 does, the others pass by."""

    def __init__(self, session: Session, attempt: int) -> None:
        recipe, world = session.recipe, session.peers.world
        self._session = session
        self._began = time.perf_counter()
        self._main = world.is_main
        self._line = LiveLine(recipe.train.steps, shown=self._main)
        self._corrupt = 0
        if not self._main:
            return
        self._journal = Journal(session.run, attempt, session.start)
        hashes = {name: opened.manifest.hash for name, opened in session.sources.items()}
        info = RunInfo(
            attempt=attempt,
            world_size=world.size,
            plan_hash=session.plan.hash,
            recipe_hash=recipe_hash(recipe),
            manifests=hashes,
        )
        self._mirror = MlflowMirror(session.run, recipe, info)
        self._mirror.start()
        going_on = f", going on from step {session.start}" if session.start else ""
        self._line.say(
            f"{recipe.name} in {session.run}: {recipe.train.steps} steps on {world.size} ranks{going_on}"
        )

    def fed(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """A step has its data: picture the first batch, write down the replaced samples of every rank."""
        events = [event for batch in micro_batches for event in batch.events]
        if self._main and step == self._session.start and micro_batches:
            batch_sheet(self._session.run, step, micro_batches[0], self._session.sources)
        if self._session.recipe.data.on_corrupt == "substitute":
            self._replaced(step, events)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A logging point."""
        if not self._main:
            return
        self._journal.write(step, metrics)
        done = step - self._session.start
        pace = (time.perf_counter() - self._began) / max(1, done)
        self._line.show(step, metrics, pace * (self._session.recipe.train.steps - step))

    def saved(self, step: int, folder: Path, seconds: float) -> None:
        """A checkpoint was committed."""
        if self._main:
            self._journal.write(step, {"checkpoint/save_s": seconds})
            append_event(self._session.run, "checkpoint", step, folder=folder.name, seconds=round(seconds, 3))

    def evaluated(self, step: int, results: Mapping[str, SourceResult]) -> None:
        """The held-out samples were evaluated."""
        if not self._main or not results:
            return
        metrics = {
            f"eval/{name}/{key}": value
            for name, result in results.items()
            for key, value in result.metrics().items()
        }
        self._journal.write(step, metrics)
        for name, result in results.items():
            self._line.say(
                f"held out after step {step}: {name} top-1 {result.top1:.1%}, top-5 {result.top5:.1%} "
                f"of {result.samples} samples"
            )

    def close(self, status: Status) -> None:
        """The attempt is over: FINISHED, KILLED (stopped by a signal) or FAILED."""
        self._line.close()
        if not self._main:
            return
        self._line.say(f"{status.lower()} after {format_seconds(time.perf_counter() - self._began)}")
        self._journal.close()
        self._mirror.close(status)

    def _replaced(self, step: int, events: list[dict[str, object]]) -> None:
        for share in self._session.peers.gather(events):
            for event in share:
                self._corrupt += 1
                if self._main:
                    append_event(self._session.run, "replaced", step, **event)
