"""The steps of an attempt, and what comes between two of them: log, checkpoint, evaluation, the end."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

from framework.data.labels import class_shares
from framework.data.loader import Batch
from framework.recipe import recipe_hash
from framework.recipe.model_sections import reconstructs
from framework.training.agreement import agreed_signal
from framework.training.counters import Counters
from framework.training.feed import Feed, commit_ledger
from framework.training.guards import CollapseGuard, DeadGuard
from framework.training.held_out import evaluate_held_out
from framework.training.meters import Meters
from framework.training.recorder import Recorder
from framework.training.session import Session
from framework.training.update import Outcome, schedule_of, take_step

__all__ = ["run_steps"]


@dataclass(frozen=True)
class Gauges:
    """What watches over the steps, and counts."""

    meters: Meters
    collapse: CollapseGuard
    dead: DeadGuard
    counters: Counters
    """Of all of them, for checkpoints."""


def run_steps(session: Session, recorder: Recorder) -> int:
    """The steps that are left; returns the signal that ended them early, or 0."""
    gauges, feed = gauges_of(session), Feed(session)
    steps, log_every = session.recipe.train.steps, session.recipe.train.log_every
    for step in range(session.start, steps):
        taken = train_step(session, recorder, gauges, feed, step)
        done, command = session.done, taken.agreed.command
        asked = session.requests.begin(command, taken.agreed.number, done)
        stop = taken.agreed.stop or asked
        if done % log_every == 0 or done == steps or stop:
            log_step(session, recorder, gauges, taken)
        paused = time.perf_counter()
        if stop:
            recorder.stopping(stop)
        stop = save_and_evaluate(session, recorder, gauges.counters, command, stop)
        gauges.meters.leave_out(time.perf_counter() - paused)
        if stop:
            return stop
    return 0


def gauges_of(session: Session) -> Gauges:
    """All gauges, as the checkpoint that training goes on from had left them."""
    recipe, world = session.recipe, session.peers.world
    blind = reconstructs(recipe.model)
    targets = {name: None if blind else recipe.data.sources[name].targets for name in recipe.data.mixture}
    meters = Meters(targets, session.device)
    scheduled = recipe.model_copy(update={"schedule": schedule_of(session)})
    collapse = CollapseGuard(scheduled, shares_of_classes(session))
    dead = DeadGuard(session.engine.module, recipe)
    counters = Counters(meters=meters, collapse=collapse, dead=dead, numbers=session.guard)
    counters.restore(session.counted, world.rank, world.size)
    return Gauges(meters, collapse, dead, counters)


def shares_of_classes(session: Session) -> dict[str, list[float]]:
    """For each multi-label source, the share of its samples to which each class applies."""
    sources = session.sources.items()
    return {n: class_shares(s).tolist() for n, s in sources if s.source.target == "multi"}


def train_step(session: Session, recorder: Recorder, gauges: Gauges, feed: Feed, step: int) -> Outcome:
    """One step, from its data to the average of the weights.

    Errors:
        Rollback, TrainingStopped: see `framework.training.numbers`.
    """
    session.heart.beat("data", step)
    began = time.perf_counter()
    micro_batches = feed.next_step(session.recipe.train.accumulation)
    waited = time.perf_counter() - began
    recorder.fed(step, micro_batches)

    taken = take_step(session, step, micro_batches, gauges.meters)
    session.heart.beat("record")
    finish_step(session, step, taken, micro_batches)
    session.saver.advance(*taken.agreed.saving)
    session.done = step + 1
    gauges.dead.step_done()
    gauges.meters.step_done(waited, (batch.seconds for batch in micro_batches))
    return taken


def finish_step(session: Session, step: int, taken: Outcome, micro_batches: list[Batch]) -> None:
    """Follow up on the optimizer and on the numbers.

    Errors:
        Rollback, TrainingStopped: see `framework.training.numbers`.
    """
    if taken.applied:
        session.state.update_average()
    session.guard.follow_up(session, step, taken.verdict, taken.applied, taken.numbers, micro_batches)


def log_step(session: Session, recorder: Recorder, gauges: Gauges, taken: Outcome) -> None:
    """Write down what the steps since the last log were like; the guards look at it, too.

    Errors:
        TrainingStopped: see `framework.training.guards`.
    """
    sources = session.recipe.data.sources
    weights = {name: sources[name].loss_weight for name in session.recipe.data.mixture}
    metrics = gauges.meters.collect(session.peers, weights) | optimizer_metrics(session, taken)
    recorder.log(session.done, metrics)
    gauges.dead.look(session.done, session.peers)
    gauges.collapse.look(session.done, metrics)
    gauges.meters.reset()
    gc.collect()


def optimizer_metrics(session: Session, taken: Outcome) -> dict[str, float]:
    """Learning rate, gradient norm (before clipping), skipped steps, and what the model has to show."""
    norm = session.engine.get_global_grad_norm() if taken.norm is None else taken.norm
    skipped = float(session.skipped)
    metrics = {"train/lr": taken.lr, "train/grad_norm": float(norm), "train/skipped_steps": skipped}
    return metrics | getattr(session.engine.module, "telemetry", dict)()


def save_and_evaluate(
    session: Session, recorder: Recorder, counters: Counters, command: str, stop: int
) -> int:
    """What is due after a step, or asked for by `command`; returns the signal that ends the steps, or 0.

    `stop` is the signal that is known so far; another one may come while the model is evaluated.
    """
    recipe, done = session.recipe, session.done
    steps, every, eval_every = recipe.train.steps, recipe.checkpoint.every, recipe.train.eval_every
    last = done == steps or bool(stop)
    if last or command == "checkpoint" or done % every == 0:
        save(session, done, counters, wait=last or command == "checkpoint")
    session.requests.finish(command, done)
    if eval_every and done % eval_every == 0 and not last:
        recorder.evaluated(done, evaluate_held_out(session))
        stop = agreed_signal(session)
        if stop and done % every:
            save(session, done, counters, wait=True)
    if stop:
        session.saver.finish()
    recorder.saved(session.saver.take_news())
    return stop


def save(session: Session, step: int, counters: Counters, wait: bool) -> None:
    """Save the state after a step; with `wait` the checkpoint is committed when this returns.

    Errors:
        TrainingStopped: there is a NaN or Inf in what would be saved; nothing would come of going on from it.
        CheckpointError: a rank could not write.
    """
    session.heart.beat("save")
    facts = {
        "recipe": recipe_hash(session.recipe),
        "plan": session.plan.hash,
        "recipe_values": session.recipe.model_dump(mode="json"),
        "accumulation": session.recipe.train.accumulation,
        "zero": session.recipe.engine.zero,
        "precision": session.recipe.engine.precision,
        "skipped_steps": session.skipped,
        "quarantine": session.loader.quarantine.digest(step),
    }
    commit_ledger(session, step)
    model, state = session.engine.module, session.state
    session.saver.start(step, model, state, facts, counters=counters.state(), wait=wait)
