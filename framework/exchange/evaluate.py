"""`tubeworks eval RUN`: evaluate a run's newest checkpoint on its held-out shards.

This process is one rank: of the world that its environment describes, or alone. Starting several is the
business of `launch`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from framework.data.sources import OpenSource, open_sources
from framework.errors import DataError, RecipeError, TubeworksError
from framework.evaluation.predictions import Predictions
from framework.evaluation.report import EvaluationReport, show_table, write_report
from framework.evaluation.run import AnyResult, evaluate
from framework.exchange.run import FinishedRun, Weights, check_classifies, open_finished, recipe_of
from framework.recipe.schema import Evaluation, Recipe
from framework.tracking.journal import Journal, last_attempt
from framework.tracking.mirror import sync_run
from framework.training.distributed import Peers, choose_device
from framework.training.rendezvous import meet
from framework.world import World

__all__ = ["evaluate_command", "evaluate_run", "parse_views"]

logger = logging.getLogger(__name__)

MAX_VIEWS = 1000
"""Temporal views of a sample; more would only exhaust the memory."""


def evaluate_command(
    run: Path,
    *,
    views: str | None = None,
    shuffle_frames: bool = False,
    ranks: int | None = None,
    weights: str | None = None,
    as_json: bool = False,
) -> None:
    """Evaluate, then print a table or JSON (rank 0 only).

    Errors:
        TubeworksError: `ranks` does not agree with the environment, or whatever `evaluate_run` finds.
    """
    world = World.from_env() or World()
    if ranks not in (None, world.size):
        raise TubeworksError(
            f"--ranks {ranks} does not fit: the environment says that this is one of {world.size} ranks"
        )
    with _process_group(run, world):
        report = evaluate_run(run, world, views=views, shuffle_frames=shuffle_frames, weights=weights)
    if not world.is_main:
        return
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n")
    else:
        show_table(report)


def evaluate_run(
    run: Path,
    world: World,
    *,
    views: str | None = None,
    shuffle_frames: bool = False,
    weights: str | None = None,
) -> EvaluationReport:
    """Evaluate the newest valid checkpoint of a run; all ranks together, torch.distributed initialised.

    Rank 0 writes `RUN/evaluations/step-….json` and `RUN/pictures/predictions-….png`, adds the numbers to the
    journal and sends them to MLflow. `views` is `4x3`, by default the recipe's; `weights` is `ema` or `raw`,
    by default averaged ones where the checkpoint has any.

    Errors:
        TubeworksError: no run, no valid checkpoint, no held-out shards, no averaged weights, no frames to
            shuffle, corrupt samples.
    """
    recipe = recipe_of(run)
    check_classifies(run, recipe)
    settings, wanted = parse_views(views, recipe.evaluation), _parse_weights(weights)
    peers = Peers(world, torch.distributed.group.WORLD if world.size > 1 else None)
    sources = peers.together(lambda: open_sources(recipe, "validation"))
    _check_sources(recipe, sources, shuffle_frames)
    finished = peers.on_main(lambda: open_finished(run, wanted))  # which reads the whole checkpoint
    device = choose_device(world)
    dtype = _precision(recipe, device)
    model = finished.model(device, dtype)
    predictions = Predictions(sources)
    results = evaluate(
        lambda pixels: model(pixels),
        sources,
        world,
        device,
        settings,
        shuffle_frames=shuffle_frames,
        workers=recipe.data.workers,
        observe=predictions if world.is_main else None,
    )
    report = _report(finished, settings, shuffle_frames, world, dtype, results)
    if world.is_main:
        _record(run, recipe, report, predictions)
    return report


def _check_sources(recipe: Recipe, sources: Mapping[str, OpenSource], shuffle_frames: bool) -> None:
    if not sources:
        raise DataError(f"no source of {recipe.name} has held-out shards: set data.sources.NAME.validation")
    if shuffle_frames and all(source.source.frames == 1 for source in sources.values()):
        raise DataError(
            f"--shuffle-frames: the held-out sources of {recipe.name} ({', '.join(sources)}) have one frame "
            "a sample, so there is nothing to shuffle"
        )


def _precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The recipe's bf16 only where the device is made for it."""
    low = recipe.engine.precision == "bf16" and device.type == "cuda"
    return torch.bfloat16 if low else torch.float32


def _report(
    finished: FinishedRun,
    settings: Evaluation,
    shuffle_frames: bool,
    world: World,
    dtype: torch.dtype,
    results: Mapping[str, AnyResult],
) -> EvaluationReport:
    evaluation = finished.recipe.evaluation
    return EvaluationReport(
        run=str(finished.folder),
        recipe=finished.recipe.name,
        step=finished.step,
        weights="ema" if finished.averaged else "raw",
        views=(settings.temporal_views, settings.spatial_views),
        recipe_views=(evaluation.temporal_views, evaluation.spatial_views),
        shuffle_frames=shuffle_frames,
        ranks=world.size,
        precision=str(dtype).removeprefix("torch."),
        sources=results,
    )


def parse_views(views: str | None, settings: Evaluation) -> Evaluation:
    """The settings with the views of `4x3` (temporal x spatial), or as they are.

    Errors:
        RecipeError: the text is not two numbers that are possible.
    """
    if views is None:
        return settings
    temporal, _, spatial = views.lower().partition("x")
    if not (temporal in map(str, range(1, MAX_VIEWS + 1)) and spatial in ("1", "3")):
        raise RecipeError(
            f"--views {views}: say temporal x spatial views, such as 4x3; temporal is 1 to {MAX_VIEWS}, "
            "spatial is 1 or 3"
        )
    return settings.model_copy(update={"temporal_views": int(temporal), "spatial_views": int(spatial)})


def _parse_weights(weights: str | None) -> Weights | None:
    if weights is None or weights == "ema" or weights == "raw":
        return weights
    raise RecipeError(f"--weights {weights}: say ema or raw")


def _record(run: Path, recipe: Recipe, report: EvaluationReport, predictions: Predictions) -> None:
    """Results file, pictures, journal, MLflow: in this order, so that the last ones can show the first."""
    write_report(run, report)
    caption = f"held-out samples and predictions after step {report.step}"
    caption += ", frames shuffled" if report.shuffle_frames else ""
    try:
        predictions.draw(run / "pictures", caption, "-shuffled" if report.shuffle_frames else "")
    except OSError as error:
        logger.warning("the pictures of predictions could not be written: %s", error)
    with Journal(run, last_attempt(run)) as journal:
        journal.write(report.step, report.metrics())
    if recipe.tracking.mlflow:
        try:
            sync_run(run, settle=False)
        except TubeworksError as error:  # the numbers are safe in the journal, MLflow may have them later
            logger.warning("%s", error)


@contextmanager
def _process_group(run: Path, world: World) -> Iterator[None]:
    """Initialise torch.distributed for the evaluation, unless somebody has, or there is one rank."""
    if world.size == 1 or torch.distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    choose_device(world)
    os.environ.update(meet(run, world, os.environ))
    torch.distributed.init_process_group(
        backend, rank=world.rank, world_size=world.size, timeout=timedelta(minutes=30)
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
