"""Numbers that go wrong: NaN and Inf in losses and gradients, and loss spikes; which samples it was.

What all ranks judge by is the loss of every rank, exchanged once a step, so all come to the same verdict. The
window of losses goes into the checkpoints: a run that goes on judges as the uninterrupted one would.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from framework.data.loader import Batch
from framework.data.quarantine import Quarantined, append_quarantine
from framework.errors import TrainingStopped
from framework.recipe.schema import Recipe
from framework.training.host import Readback
from framework.training.run_folder import append_event
from framework.watch.attempts import attempts_of, newest_checkpoint

if TYPE_CHECKING:
    from framework.training.session import Session

__all__ = ["LOWER_THE_RATE", "NumbersGuard", "Rollback", "StepNumbers", "Verdict"]

log = logging.getLogger(__name__)

LOWER_THE_RATE = (
    "lower optimizer.lr or raise schedule.warmup. The run's last checkpoint is from before; a changed recipe "
    "needs a new --run folder"
)
REMEMBERED = 100
"""Steps among which bad ones are counted."""
ENOUGH = 8
"""Losses below which nothing can be called a spike, in shares of the window: one eighth."""
MAD_TO_SIGMA = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
SHOWN = 64
Sample = tuple[str, int]


class Rollback(Exception):
    """All ranks go back to the last valid checkpoint; the samples to go without are in quarantine already."""


@dataclass(frozen=True)
class Verdict:
    """What was wrong with a step: `kind` is empty for a sound one."""

    kind: str = ""
    """`loss` and `gradients` that are not finite, or a `spike`."""
    loss: float = 0.0
    score: float = 0.0
    """Robust standard deviations above the median."""
    ranks: tuple[int, ...] = ()
    """Whose loss is not finite."""

    def describe(self) -> str:
        """In words."""
        if self.kind == "loss":
            return f"the loss is {self.loss} (rank {', '.join(map(str, self.ranks))})"
        if self.kind == "spike":
            return f"the loss jumped to {self.loss:.4g}, {self.score:.1f} robust standard deviations"
        return "its gradients are not finite"


class StepNumbers:
    """The losses of this rank's micro-batches of one step, and which samples' outputs are not finite."""

    def __init__(self, device: torch.device, micro_batches: int) -> None:
        self._share = 1.0 / micro_batches
        self._left = micro_batches
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._loss: Readback | None = None
        self._rows: list[tuple[str, Tensor, Tensor]] = []

    def add(self, source: str, index: Tensor, outputs: Tensor) -> None:
        """Look at what the model gives for samples, (batch, …); nothing waits for the device."""
        finite = outputs.detach().isfinite().reshape(len(index), -1).all(dim=1)
        self._rows.append((source, index, finite))

    def micro_batch_done(self, loss: Tensor) -> None:
        """Count a micro-batch's loss; the last one's copy to the host runs beside the backward pass."""
        self._total += loss.detach().double() * self._share
        self._left -= 1
        if self._left == 0:
            self._loss = Readback(self._total)

    def loss(self) -> float:
        """The mean loss of this rank's share of the step, once all of its micro-batches are counted."""
        assert self._loss is not None
        return float(self._loss.read())

    def not_finite(self) -> list[Sample]:
        """The samples (source, index) with NaN or Inf among their logits."""
        return [
            (source, int(number))
            for source, index, finite in self._rows
            for number, good in zip(index.tolist(), finite.tolist(), strict=True)
            if not good
        ]


class NumbersGuard:
    """Judges every step, in the same way on every rank, and does what `guards.on_bad_numbers` says."""

    def __init__(self, recipe: Recipe) -> None:
        self._settings = recipe.guards
        self._losses: deque[float] = deque(maxlen=recipe.guards.window)
        self._bad: deque[int] = deque(maxlen=REMEMBERED)

    @property
    def refuses_spikes(self) -> bool:
        """Whether a step must be judged before its update, so that the update of a spike can be dropped."""
        return self._settings.on_bad_numbers == "skip" and self._settings.spike > 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the window of losses, and the steps that were bad."""
        return {"losses": list(self._losses), "bad": list(self._bad)}

    def restore(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on where a checkpoint was; all ranks have saved the same."""
        self._losses.extend(states[0]["losses"])
        self._bad.extend(states[0]["bad"])

    def judge(self, losses: Sequence[float]) -> Verdict:
        """Judge a step by the losses of all ranks; asks nobody and changes nothing."""
        mean = math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
        if not math.isfinite(mean):
            ranks = tuple(rank for rank, loss in enumerate(losses) if not math.isfinite(loss))
            return Verdict("loss", next((losses[rank] for rank in ranks), mean), 0.0, ranks)
        score = self._score(mean)
        return Verdict("spike" if 0 < self._settings.spike < score else "", mean, score)

    def follow_up(
        self,
        session: Session,
        step: int,
        verdict: Verdict,
        applied: bool,
        numbers: StepNumbers,
        micro_batches: Sequence[Batch],
    ) -> None:
        """After the update of a step: count, name, write down, and go back or stop where that is due.

        Errors:
            Rollback: on all ranks.
            TrainingStopped: on all ranks: too many bad steps, or rollbacks to the same checkpoint.
        """
        if not applied and not verdict.kind:
            verdict = Verdict("gradients", verdict.loss)
        if not verdict.kind:
            self._losses.append(verdict.loss)
            return
        if not applied:
            session.skipped += 1
        self._bad.append(step)
        samples = self._offenders(session, verdict, numbers, micro_batches)
        entries = session.peers.on_main(lambda: self._write(session, step, verdict, applied, samples))
        names = ", ".join(f"{entry.source} {entry.key}" for entry in entries[:8])
        more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
        if session.peers.world.is_main:
            update = "applied" if applied else f"not applied ({session.skipped} so far)"
            log.warning(
                "step %d was %s: %s; samples: %s%s", step + 1, update, verdict.describe(), names, more
            )
        self._stop_if_too_many(step, verdict, f"{names}{more}")
        if self._settings.on_bad_numbers == "rollback":
            self._roll_back(session, step, verdict, samples)

    def _score(self, loss: float) -> float:
        """Robust z-score of a loss in the window: (loss - median) / (1.4826 MAD)."""
        if len(self._losses) < max(8, self._settings.window // ENOUGH):
            return 0.0
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(one - median) for one in self._losses)
        # Losses that hardly move would make a spike of every ripple.
        return (loss - median) / max(MAD_TO_SIGMA * deviation, 1e-3 * abs(median), 1e-12)

    def _offenders(
        self, session: Session, verdict: Verdict, numbers: StepNumbers, micro_batches: Sequence[Batch]
    ) -> list[Sample]:
        """The samples whose own outputs are not finite; where there are none, all of the step's."""
        own = numbers.not_finite() if verdict.kind != "spike" else []
        fed = [
            (name, int(index))
            for batch in micro_batches
            for name, group in batch.groups.items()
            for index in group.index.tolist()
        ]
        gathered = session.peers.gather((own, fed))
        named = [sample for share, _ in gathered for sample in share]
        return list(dict.fromkeys(named or [sample for _, share in gathered for sample in share]))

    def _write(
        self, session: Session, step: int, verdict: Verdict, applied: bool, samples: Sequence[Sample]
    ) -> list[Quarantined]:
        """Write the event (rank 0); returns the first of the samples with their places."""
        entries = [_entry(session, step, verdict, sample) for sample in samples[:SHOWN]]
        places = [f"{entry.source} {entry.key} {entry.shard} {entry.offset}" for entry in entries]
        facts = {"reason": verdict.describe(), "policy": self._settings.on_bad_numbers, "samples": places}
        if verdict.kind == "spike":
            facts["score"] = round(verdict.score, 2)
        append_event(session.run, "spike" if applied else "skipped", step + 1, **facts)
        return entries

    def _stop_if_too_many(self, step: int, verdict: Verdict, names: str) -> None:
        recent = [one for one in self._bad if one > step - REMEMBERED]
        if len(recent) >= self._settings.bad_limit:
            raise TrainingStopped(
                f"{len(recent)} of the last {REMEMBERED} steps went wrong (guards.bad_limit), the last is "
                f"step {step + 1}: {verdict.describe()}; samples: {names}. If it is the same samples, take "
                f"them out (guards.on_bad_numbers=rollback does); if not, {LOWER_THE_RATE}"
            )

    def _roll_back(self, session: Session, step: int, verdict: Verdict, samples: Sequence[Sample]) -> None:
        """Put the samples into quarantine from this step on, and leave the steps."""
        session.saver.finish()  # a checkpoint on its way is from before this step

        def settle() -> str:
            target = newest_checkpoint(session.run)
            before = [
                attempt
                for attempt in attempts_of(session.run)
                if attempt.get("cause") == "rollback" and attempt.get("checkpoint") == target
            ]
            place = "the start" if target is None else f"the checkpoint of step {target}"
            if len(before) >= self._settings.bad_limit:
                raise TrainingStopped(
                    f"went back to {place} {len(before)} times (guards.bad_limit), and step {step + 1} still "
                    f"goes wrong: {verdict.describe()}: {LOWER_THE_RATE}"
                )
            entries = [_entry(session, step, verdict, sample) for sample in samples]
            append_quarantine(session.run, entries)
            append_event(session.run, "rollback", step + 1, to=target or 0, samples=len(entries))
            return place

        place = session.peers.on_main(settle)
        raise Rollback(
            f"step {step + 1}: {verdict.describe()}; back to {place} without {len(samples)} samples"
        )


def _entry(session: Session, step: int, verdict: Verdict, sample: Sample) -> Quarantined:
    name, index = sample
    opened = session.sources[name]
    info = opened.manifest.sample(int(opened.selection[index]))
    reason = f"step {step + 1}: {verdict.describe()}"
    return Quarantined(name, index, info.key, info.shard, info.offset, reason, step)
