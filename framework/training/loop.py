"""The training of one run, from top to bottom."""

from __future__ import annotations

import gc
import logging
import platform
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from framework.data.loader import training_batches
from framework.data.plan import Plan
from framework.data.prefetch import check_cache
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.errors import TubeworksError
from framework.models.registry import build_model, inputs_of
from framework.recipe.schema import Recipe
from framework.tracking.mirror import Status
from framework.training.agreement import agreed_signal
from framework.training.checkpoint import CheckpointReader, choose_checkpoint
from framework.training.data_facts import write_data_facts
from framework.training.distributed import Peers, choose_device, start_process_group
from framework.training.elastic import fitted
from framework.training.engine import start_engine
from framework.training.feed import agreed_quarantine, begin_ledger
from framework.training.held_out import evaluate_held_out
from framework.training.initial import initialise
from framework.training.losses import check_mixing
from framework.training.memory import collected_by_hand, returned_memory
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
from framework.training.steps import run_steps
from framework.training.supervision import Supervision
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


def will_go_on(session: Session, stopped_by: int) -> bool:
    """Whether the supervisor will start the run again after this signal; rank 0 asks, all know."""
    supervision = session.supervision
    if not stopped_by or supervision is None:
        return False
    return session.peers.on_main(lambda: supervision.goes_on(stopped_by))


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
