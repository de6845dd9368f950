"""The training of one run, from top to bottom."""

from __future__ import annotations

import gc
import logging
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from framework.data.labels import class_shares
from framework.data.loader import Batch, training_batches
from framework.data.plan import Plan
from framework.data.prefetch import check_cache
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.errors import TubeworksError
from framework.models.registry import build_model, inputs_of
from framework.recipe import recipe_hash
from framework.recipe.model_sections import reconstructs
from framework.recipe.schema import Recipe
from framework.tracking.mirror import Status
from framework.training.agreement import agreed_signal
from framework.training.checkpoint import CheckpointReader, choose_checkpoint
from framework.training.counters import Counters
from framework.training.data_facts import write_data_facts
from framework.training.distributed import Peers, choose_device, start_process_group
from framework.training.elastic import fitted
from framework.training.engine import start_engine
from framework.training.feed import Feed, agreed_quarantine, begin_ledger, commit_ledger
from framework.training.guards import CollapseGuard, DeadGuard
from framework.training.held_out import evaluate_held_out
from framework.training.initial import initialise
from framework.training.losses import check_mixing
from framework.training.memory import collected_by_hand, returned_memory
from framework.training.meters import Meters
from framework.training.numbers import Rollback
from framework.training.optim import resolve_schedule
from framework.training.recorder import Recorder
from framework.training.retention import prune
from framework.training.run_folder import (
    append_event,
    check_checkpoint,
    check_continuation,
    held_alone,
    history_of,
    open_run,
)
from framework.training.saver import Saver, tidy
from framework.training.session import Session
from framework.training.signals import SignalFlag
from framework.training.state import TrainState
from framework.training.supervision import Supervision
from framework.training.update import Outcome, schedule_of, take_step
from framework.watch.attempts import close_own_attempt
from framework.watch.heart import Heart
from framework.watch.sentinel import SLOW
from framework.world import World

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    run: Path,
    world: World,
    signals: SignalFlag,
    heart: Heart,
    supervision: Supervision | None = None,
) -> tuple[int, bool]:
    """Train a recipe in a run folder, going on from its newest valid checkpoint if it has one.

    Returns the number of the signal that ended training early, after a checkpoint (0 at the regular end), and
    whether the supervisor will start the run again.

    Errors:
        TubeworksError: with a message for the user, on every rank.
    """
    heart.beat("start")
    device = choose_device(world)
    peers = start_process_group(world, device, 2 * SLOW * recipe.guards.hang_seconds, run)
    with held_alone(run, peers, signals):
        while True:
            try:
                return attempt_run(recipe, run, device, peers, signals, heart, supervision)
            except Rollback as rollback:
                log.warning("%s", rollback)
            gc.collect()  # what the attempt held: the model, DeepSpeed's buffers


def attempt_run(
    recipe: Recipe,
    run: Path,
    device: torch.device,
    peers: Peers,
    signals: SignalFlag,
    heart: Heart,
    supervision: Supervision | None,
) -> tuple[int, bool]:
    """One attempt, from the newest valid checkpoint on; returns what `train` does.

    Errors:
        Rollback: on all ranks, when the next attempt is to begin at once in the same processes.
    """
    heart.beat("start")
    session = prepare(recipe, run, device, peers, signals, heart, supervision)
    hosts = list(dict.fromkeys(peers.gather(platform.node())))
    # All ranks are here: from now on none leaves alone. One that a signal reaches between these two lines
    # still does, and the others lose contact to it; nothing is trained yet.
    signals.begin()
    attempt = peers.on_main(lambda: record_attempt(session, hosts))
    heart.begin(attempt, session.start, peers.collectives)
    recorder = Recorder(session, attempt)
    status: Status = "FAILED"
    cause, stopped_by, goes_on = "failed", 0, False
    try:
        with closing(session.batches), collected_by_hand(), settled(session.saver):
            stopped_by = run_steps(session, recorder)
        heart.beat("finish")
        if not stopped_by:
            recorder.finished(recipe.train.steps)
            recorder.evaluated(recipe.train.steps, evaluate_held_out(session))
            stopped_by = agreed_signal(session)
        goes_on = will_go_on(session, stopped_by)
        status, cause = ("KILLED", "stopped") if stopped_by else ("FINISHED", "finished")
        status = "RUNNING" if goes_on else status
    except Rollback:
        status, cause = "RUNNING", "rollback"
        session.engine.destroy()
        raise
    except BaseException as error:
        heart.failed(error)
        raise
    finally:
        session.requests.close(session.done)
        try:
            recorder.close(status)
        finally:
            if peers.world.is_main:
                cause += f" by {signal.Signals(stopped_by).name}" if stopped_by else ""
                close_own_attempt(run, attempt, cause, session.done)
    return stopped_by, goes_on


def prepare(
    asked: Recipe,
    run: Path,
    device: torch.device,
    peers: Peers,
    signals: SignalFlag,
    heart: Heart,
    supervision: Supervision | None,
) -> Session:
    """Everything that can fail before the first step: data, plan, checkpoint, model, engine."""
    recipe = peers.on_main(lambda: fitted(asked, run, peers.world.size))
    sources, held_out, plan = peers.together(lambda: open_data(recipe, peers.world))
    peers.on_main(lambda: check_continuation(run, recipe, plan))
    peers.on_main(lambda: tidy(run))
    checkpoint = choose_checkpoint(run, peers)
    reader = CheckpointReader(checkpoint) if checkpoint else None
    if reader:
        check_checkpoint(reader.folder, reader.manifest, recipe, plan)
    start = reader.step if reader else 0
    quarantine = agreed_quarantine(run, peers, reader.manifest if reader else None)
    # Before the model is built: the data workers are forked here, and would keep pages of its weights alive.
    loader = training_batches(
        recipe,
        sources,
        plan,
        peers.world,
        start_step=start,
        stop_step=recipe.train.steps,
        quarantine=quarantine,
    )
    engine, state, origin = build(recipe, reader, peers, heart)
    return Session(
        asked=asked,
        recipe=recipe,
        run=run,
        device=device,
        peers=peers,
        signals=signals,
        heart=heart,
        supervision=supervision,
        sources=sources,
        held_out=held_out,
        plan=plan,
        loader=loader,
        engine=engine,
        state=state,
        saver=saver_of(recipe, run, peers, heart),
        start=start,
        counted=reader.manifest.get("counters", ()) if reader else (),
        skipped=reader.manifest["skipped_steps"] if reader else 0,
        origin=origin,
    )


def build(
    recipe: Recipe, reader: CheckpointReader | None, peers: Peers, heart: Heart
) -> tuple[Any, TrainState, dict[str, Any] | None]:
    """The engine with its model, the trainable state, and where the weights of a new run come from."""
    heart.beat("start")
    with returned_memory():
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model, inputs_of(recipe))
        model.activation_checkpointing = recipe.train.activation_checkpointing  # type: ignore[assignment]
        if reader:
            reader.load_into(model)
        origin = initialise(model, recipe, peers) if recipe.init and not reader else None
        heart.beat("start")
        engine = start_engine(model, recipe, peers.world)
        heart.beat("start")
        state = TrainState(engine, recipe.train.ema_decay)
        if reader:
            state.restore(reader.read, reader.kinds, reader.manifest["optimizer_steps"])
    return engine, state, origin


def saver_of(recipe: Recipe, run: Path, peers: Peers, heart: Heart) -> Saver:
    """What writes the run's checkpoints, and lets go of old ones as the recipe says."""
    keep = recipe.checkpoint
    return Saver(
        run,
        peers,
        keep.mode,
        prune=lambda: prune(run, keep),
        history=lambda: history_of(run),
        beat=lambda: heart.beat("save"),
    )


def open_data(recipe: Recipe, world: World) -> tuple[dict[str, OpenSource], dict[str, OpenSource], Plan]:
    """The training shards, the held-out shards, and the plan of training, which fits the ranks.

    The held-out ones are opened here, too: what is wrong with them must not show after the last step.
    """
    sources = open_sources(recipe, "train")
    held_out = open_sources(recipe, "validation")
    plan = build_plan(recipe, sources)
    resolve_schedule(recipe, {name: len(source) for name, source in sources.items()})
    plan.check(world.size, recipe.train.accumulation)
    check_mixing(recipe, world.size)
    check_cache(recipe, sources, held_out, plan, world)
    return sources, held_out, plan


def record_attempt(session: Session, hosts: list[str]) -> int:
    """Write down that an attempt begins, and with which weights; returns its number."""
    recipe, world = session.asked, session.peers.world
    accumulation = session.recipe.train.accumulation
    attempt = open_run(session.run, recipe, world, session.plan, session.start, accumulation, hosts)
    begin_ledger(session, attempt)
    write_data_facts(session.run, session.sources)
    if session.origin:
        append_event(session.run, "initialised", session.start, **session.origin)
    return attempt


def run_steps(session: Session, recorder: Recorder) -> int:
    """The steps that are left; returns the signal that ended them early, or 0."""
    recipe, peers = session.recipe, session.peers
    steps, accumulation = recipe.train.steps, recipe.train.accumulation
    weights = {name: recipe.data.sources[name].loss_weight for name in recipe.data.mixture}
    blind = reconstructs(recipe.model)
    targets = {name: None if blind else recipe.data.sources[name].targets for name in recipe.data.mixture}
    meters = Meters(targets, session.device)
    feed = Feed(session)
    collapse = CollapseGuard(
        recipe.model_copy(update={"schedule": schedule_of(session)}), shares_of_classes(session)
    )
    dead = DeadGuard(session.engine.module, recipe)
    counters = Counters(meters=meters, collapse=collapse, dead=dead, numbers=session.guard)
    counters.restore(session.counted, peers.world.rank, peers.world.size)
    for step in range(session.start, steps):
        session.heart.beat("data", step)
        began = time.perf_counter()
        micro_batches = feed.next_step(accumulation)
        waited = time.perf_counter() - began
        recorder.fed(step, micro_batches)

        taken = take_step(session, step, micro_batches, meters)
        session.heart.beat("record")
        finish_step(session, step, taken, micro_batches)
        session.saver.advance(*taken.agreed.saving)
        dead.step_done()

        done = session.done = step + 1
        meters.step_done(waited, (batch.seconds for batch in micro_batches))
        command = taken.agreed.command
        asked = session.requests.begin(command, taken.agreed.number, done)
        stop = taken.agreed.stop or asked
        if done % recipe.train.log_every == 0 or done == steps or stop:
            metrics = meters.collect(peers, weights) | optimizer_metrics(session, taken)
            recorder.log(done, metrics)
            dead.look(done, peers)
            collapse.look(done, metrics)
            meters.reset()
            gc.collect()
        paused = time.perf_counter()
        if stop:
            recorder.stopping(stop)
        last = done == steps or bool(stop)
        if last or command == "checkpoint" or done % recipe.checkpoint.every == 0:
            save(session, done, counters, wait=last or command == "checkpoint")
        session.requests.finish(command, done)
        if recipe.train.eval_every and done % recipe.train.eval_every == 0 and done < steps and not stop:
            recorder.evaluated(done, evaluate_held_out(session))
            stop = agreed_signal(session)
            if stop and done % recipe.checkpoint.every:
                save(session, done, counters, wait=True)
        if stop:
            session.saver.finish()
        recorder.saved(session.saver.take_news())
        meters.leave_out(time.perf_counter() - paused)
        if stop:
            return stop
    return 0


def shares_of_classes(session: Session) -> dict[str, list[float]]:
    """For each multi-label source, the share of its samples to which each class applies."""
    sources = session.sources.items()
    return {n: class_shares(s).tolist() for n, s in sources if s.source.target == "multi"}


def will_go_on(session: Session, stopped_by: int) -> bool:
    """Whether the supervisor will start the run again after this signal; rank 0 asks, all know."""
    supervision = session.supervision
    if not stopped_by or supervision is None:
        return False
    return session.peers.on_main(lambda: supervision.goes_on(stopped_by))


def finish_step(session: Session, step: int, taken: Outcome, micro_batches: list[Batch]) -> None:
    """Follow up on the optimizer and on the numbers.

    Errors:
        Rollback, TrainingStopped: see `framework.training.numbers`.
    """
    if taken.applied:
        session.state.update_average()
    session.guard.follow_up(session, step, taken.verdict, taken.applied, taken.numbers, micro_batches)


def optimizer_metrics(session: Session, taken: Outcome) -> dict[str, float]:
    """Learning rate, gradient norm (before clipping), skipped steps, and what the model has to show."""
    norm = session.engine.get_global_grad_norm() if taken.norm is None else taken.norm
    skipped = float(session.skipped)
    metrics = {"train/lr": taken.lr, "train/grad_norm": float(norm), "train/skipped_steps": skipped}
    return metrics | getattr(session.engine.module, "telemetry", dict)()


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


@contextmanager
def settled(saver: Saver) -> Iterator[None]:
    """Leave no checkpoint half written behind, whatever ends the steps."""
    try:
        yield
    except TubeworksError:  # which all ranks raise together
        saver.close(together=True)
        raise
    except BaseException:
        saver.close(together=False)
        raise
