"""`tubeworks pictures RUN`: what the model of a run has learned, for the eye."""

from __future__ import annotations

from pathlib import Path

from framework.evaluation.anatomy import PREFIX, draw_anatomy
from framework.exchange.run import recipe_of
from framework.training.checkpoint import CheckpointReader, newest_valid
from framework.training.storage import explain_os_error

__all__ = ["pictures_command"]


def pictures_command(run: Path) -> list[Path]:
    """Draw the newest valid checkpoint; returns the PNG files.

    Errors:
        TubeworksError: no run, no valid checkpoint, a model with several tokenizers, or a picture cannot be
            written.
    """
    recipe = recipe_of(run)
    reader = CheckpointReader(newest_valid(run))
    with explain_os_error(run / "pictures"):
        return draw_anatomy(recipe, reader.tensors(prefix=PREFIX), reader.step, run / "pictures")
