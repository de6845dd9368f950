"""The training of one run, from top to bottom."""

from __future__ import annotations

import gc
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from framework.data.labels import class_shares
from framework.data.loader import Batch, training_batches
from framework.data.plan import Plan
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.errors import CheckpointError, TrainingStopped, TubeworksError
from framework.forecast.memory_advice import memory_explained
from framework.models.registry import build_model, inputs_of
from framework.recipe import recipe_hash
from framework.recipe.model_sections import reconstructs
from framework.recipe.schema import Recipe
from framework.tracking.mirror import Status
from framework.training.agreement import agreed_signal
from framework.training.checkpoint import CheckpointReader, choose_checkpoint
from framework.training.counters import Counters
from framework.training.distributed import Peers, choose_device, start_process_group
from framework.training.engine import start_engine, unsharded_norm
from framework.training.feed import Feed, agreed_quarantine, begin_ledger, commit_ledger
from framework.training.guards import CollapseGuard, DeadGuard
from framework.training.held_out import evaluate_held_out
from framework.training.initial import initialise
from framework.training.memory import collected_by_hand, returned_memory
from framework.training.meters import Meters
from framework.training.optim import learning_rate
from framework.training.recorder import ENDINGS, Recorder
from framework.training.retention import prune
from framework.training.run_folder import append_event, check_continuation, held_alone, open_run
from framework.training.saver import Saver, tidy
from framework.training.session import Session
from framework.training.signals import SignalFlag
from framework.training.state import TrainState
from framework.training.step import micro_step
from framework.training.transfer import on_device
from framework.watch.attempts import close_attempt
from framework.watch.heart import Heart
from framework.watch.sentinel import SLOW
from framework.world import World

__all__ = ["train"]

log = logging.getLogger(__name__)

LOWER_THE_RATE = (
    "lower optimizer.lr or raise schedule.warmup. The run's last checkpoint is from before; a changed recipe "
    "needs a new --run folder"
)


def train(recipe: Recipe, run: Path, world: World, signals: SignalFlag, heart: Heart) -> int:
    """Train a recipe in a run folder, going on from its newest valid checkpoint if it has one.

    Returns the number of the signal that ended training early, after a checkpoint; 0 at the regular end.

    Errors:
        TubeworksError: with a message for the user, on every rank.
    """
    device = choose_device(world)
    peers = start_process_group(world, device, 2 * SLOW * recipe.guards.hang_seconds)
    with held_alone(run, peers):
        session = prepare(recipe, run, device, peers, signals, heart)
        attempt = peers.on_main(lambda: record_attempt(session))
        heart.begin(attempt, session.start, peers.collectives)
        recorder = Recorder(session, attempt)
        status: Status = "FAILED"
        stopped_by = 0
        try:
            with closing(session.batches), collected_by_hand(), settled(session.saver):
                stopped_by = run_steps(session, recorder)
            heart.beat("finish")
            if not stopped_by:
                recorder.finished(recipe.train.steps)
                recorder.evaluated(recipe.train.steps, evaluate_held_out(session))
                stopped_by = agreed_signal(session)
            status = "KILLED" if stopped_by else "FINISHED"
        except BaseException as error:
            heart.failed(error)
            raise
        finally:
            recorder.close(status)
            if world.is_main:
                cause = ENDINGS[status] + (f" by {signal.Signals(stopped_by).name}" if stopped_by else "")
                close_attempt(run, attempt, cause=cause, end_step=session.done)
    return stopped_by


def prepare(
    recipe: Recipe, run: Path, device: torch.device, peers: Peers, signals: SignalFlag, heart: Heart
) -> Session:
    """Everything that can fail before the first step: data, plan, checkpoint, model, engine."""
    sources, held_out, plan = peers.together(lambda: open_data(recipe, peers.world))
    peers.on_main(lambda: check_continuation(run, recipe, plan.hash))
    peers.on_main(lambda: tidy(run))
    checkpoint = choose_checkpoint(run, peers)
    reader = CheckpointReader(checkpoint) if checkpoint else None
    if reader and reader.manifest["plan"] != plan.hash:
        raise CheckpointError(f"{reader.folder} is of a run with other shards or another order of samples")
    start = reader.step if reader else 0
    quarantine = agreed_quarantine(run, peers, reader.manifest if reader else None)
    # Before the model is built: the data workers are forked here, and would keep pages of its weights alive.
    batches = training_batches(
        recipe,
        sources,
        plan,
        peers.world,
        start_step=start,
        stop_step=recipe.train.steps,
        quarantine=quarantine,
    )

    with returned_memory():
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model, inputs_of(recipe))
        model.activation_checkpointing = recipe.train.activation_checkpointing  # type: ignore[assignment]
        if reader:
            reader.load_into(model)
        origin = initialise(model, recipe, peers) if recipe.init and not reader else None
        engine = start_engine(model, recipe, peers.world)
        state = TrainState(engine, recipe.train.ema_decay)
        if reader:
            state.restore(reader.read, reader.kinds, reader.manifest["optimizer_steps"])
    keep = recipe.checkpoint
    saver = Saver(run, peers, keep.mode, prune=lambda: prune(run, keep))
    return Session(
        recipe,
        run,
        device,
        peers,
        signals,
        sources,
        held_out,
        plan,
        batches,
        on_device(batches, device),
        heart,
        engine,
        state,
        saver,
        start,
        start,
        counted=reader.manifest.get("counters", ()) if reader else (),
        skipped=reader.manifest["skipped_steps"] if reader else 0,
        origin=origin,
    )


def open_data(recipe: Recipe, world: World) -> tuple[dict[str, OpenSource], dict[str, OpenSource], Plan]:
    """The training shards, the held-out shards, and the plan of training, which fits the ranks.

    The held-out ones are opened here, too: what is wrong with them must not show after the last step.
    """
    sources = open_sources(recipe, "train")
    held_out = open_sources(recipe, "validation")
    plan = build_plan(recipe, sources)
    plan.check(world.size, recipe.train.accumulation)
    return sources, held_out, plan


def record_attempt(session: Session) -> int:
    """Write down that an attempt begins, and with which weights; returns its number."""
    attempt = open_run(session.run, session.recipe, session.peers.world, session.plan.hash, session.start)
    begin_ledger(session, attempt)
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
    collapse = CollapseGuard(recipe, shares_of_classes(session))
    dead = DeadGuard(session.engine.module, recipe)
    counters = Counters(meters=meters, collapse=collapse, dead=dead)
    counters.restore(session.counted, peers.world.rank, peers.world.size)
    for step in range(session.start, steps):
        session.heart.beat("data", step)
        began = time.perf_counter()
        micro_batches = feed.next_step(accumulation)
        waited = time.perf_counter() - began
        recorder.fed(step, micro_batches)

        lr, norm = take_step(session, step, micro_batches, meters)
        dead.step_done()

        done = session.done = step + 1
        session.heart.beat("agree")
        meters.step_done(waited, (batch.seconds for batch in micro_batches))
        stop = agreed_signal(session)
        session.heart.beat("record")
        if done % recipe.train.log_every == 0 or done == steps or stop:
            metrics = meters.collect(peers, weights) | optimizer_metrics(session, lr, norm)
            recorder.log(done, metrics)
            stop_if_not_finite(metrics, done)
            dead.look(done, peers)
            collapse.look(done, metrics)
            meters.reset()
            gc.collect()
        paused = time.perf_counter()
        if stop:
            recorder.stopping(stop)
        last = done == steps or bool(stop)
        if last or done % recipe.checkpoint.every == 0:
            save(session, done, counters, wait=last)
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


def take_step(
    session: Session, step: int, micro_batches: list[Batch], meters: Meters
) -> tuple[float, torch.Tensor | None]:
    """Forward, backward and update; returns the learning rate, and under ZeRO-0 the gradients' norm."""
    recipe, engine = session.recipe, session.engine
    lr = learning_rate(step, base=recipe.optimizer.lr, steps=recipe.train.steps, schedule=recipe.schedule)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    norm = None
    with memory_explained(recipe, session.peers.world, session.device):
        for micro, batch in enumerate(micro_batches):
            samples = {name: group.index for name, group in batch.groups.items()}
            session.heart.beat("forward", step, micro, samples)
            loss = micro_step(engine, batch, recipe.data.sources, session.device, meters)
            session.heart.beat("backward", step, micro)
            engine.backward(loss)
            norm = unsharded_norm(engine)
            session.heart.beat("update", step, micro)
            engine.step()
    finish_step(session, step)
    return lr, norm


def finish_step(session: Session, step: int) -> None:
    """Follow up on the optimizer: DeepSpeed skips a step with NaN or Inf gradients without a word."""
    if session.engine.was_step_applied():
        session.state.update_average()
        return
    session.skipped += 1
    log.warning(
        "step %d was not applied: its gradients are not finite (%d skipped so far)", step + 1, session.skipped
    )
    session.peers.on_main(
        lambda: append_event(session.run, "skipped", step + 1, reason="gradients are not finite")
    )


def optimizer_metrics(session: Session, lr: float, unsharded: torch.Tensor | None) -> dict[str, float]:
    """Learning rate, gradient norm (before clipping), skipped steps, and what the model has to show."""
    norm = session.engine.get_global_grad_norm() if unsharded is None else unsharded
    skipped = float(session.skipped)
    metrics = {"train/lr": lr, "train/grad_norm": float(norm), "train/skipped_steps": skipped}
    return metrics | getattr(session.engine.module, "telemetry", dict)()


def stop_if_not_finite(metrics: dict[str, float], step: int) -> None:
    """End a run whose loss is NaN or infinite; every rank sees the same number."""
    loss = metrics["train/loss"]
    if not torch.isfinite(torch.tensor(loss)):
        raise TrainingStopped(f"the loss at step {step} is {loss}: {LOWER_THE_RATE}")


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
