"""The MLflow run of a run folder before its training begins, and after it was given up."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from framework.tracking.git import masked
from framework.tracking.lock import RunLock
from framework.tracking.mirror import RunInfo, Status, keep_settings, kept_settings, settings_of
from framework.tracking.sender import Sender, load_state, reason, save_state

if TYPE_CHECKING:
    from framework.recipe.schema import Recipe

__all__ = ["register_run", "settle_run"]

logger = logging.getLogger(__name__)

LOCK_SECONDS = 15.0
"""How long the mirror of the last attempt may take to let go."""


def register_run(run: Path, recipe: Recipe, info: RunInfo) -> str | None:
    """Make the MLflow run of a run that is about to be submitted, with the status SCHEDULED; returns its id.

    None where the recipe wants no MLflow, or where its server does not answer: then the training makes it.
    """
    if not recipe.tracking.mlflow:
        return None
    if (run / "tracking.json").is_file():  # it has been trained before, or submitted
        settings = kept_settings(run)
    else:
        settings = settings_of(run, recipe, info)
        keep_settings(run, settings)
    sender, lock = Sender(settings), RunLock(run)
    if not lock.acquire():
        return sender.run_id
    try:
        sender.connect(running=False)
        sender.mark("SCHEDULED")
    except Exception as error:  # noqa: BLE001 - whatever a server does, it must not prevent a submission
        logger.warning(
            "MLflow at %s cannot be reached now (%s): the training will try again",
            masked(settings.uri),
            reason(error),
        )
    finally:
        lock.release()
    return sender.run_id


def settle_run(run: Path, status: Status) -> bool:
    """Set how a run ended that nobody will start again, and send what is missing; whether MLflow took it.

    What it does not take is kept for `tubeworks sync`.
    """
    if not (run / "tracking.json").is_file():  # the recipe wants no MLflow
        return True
    lock, deadline = RunLock(run), time.monotonic() + LOCK_SECONDS
    while not lock.acquire():
        if time.monotonic() > deadline:
            logger.warning("%s is still being sent to MLflow: run `tubeworks sync %s` later", run, run)
            return False
        time.sleep(0.2)
    try:
        save_state(run, {**load_state(run), "status": status, "status_sent": False})
        sender = Sender(kept_settings(run))
        sender.connect(running=False)
        sender.send_points()
        sender.send_files()
        sender.finish(status)
    except Exception as error:  # noqa: BLE001 - the status is on disk, and `tubeworks sync` sends it
        logger.warning("MLflow cannot be told that %s is %s: %s", run, status, reason(error))
        return False
    finally:
        lock.release()
    return True
