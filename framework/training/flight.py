"""A save on its way, and the threads that carry it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.errors import CheckpointError, TubeworksError
from framework.training.snapshot import Share
from framework.training.storage import Abandoned, FileEntry

__all__ = ["Flight", "Task"]

log = logging.getLogger(__name__)


@dataclass
class Flight:
    """A save on its way."""

    step: int
    temporary: Path
    final: Path
    share: Share
    about: dict[str, Any]
    counters: Any
    began: float
    stall: float = 0.0
    entries: list[FileEntry] = field(default_factory=list)
    bytes: int = 0
    committing: bool = False
    given_up: threading.Event = field(default_factory=threading.Event)
    pieces: int = 0
    """How far this rank's thread is: pieces of files that it has begun."""

    def abandoned(self) -> bool:
        """Asked before each piece: whether to give up."""
        self.pieces += 1
        return self.given_up.is_set()


class Task:
    """Work in a thread of its own, which keeps its failure until somebody asks."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.failure: TubeworksError | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for its end, so long at the most."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._work()
        except Abandoned:
            return
        except TubeworksError as error:
            self.failure = error
        except Exception as error:  # a defect must end the run, too, and not only this thread
            log.exception("writing a checkpoint failed")
            self.failure = CheckpointError(f"{type(error).__name__}: {error}")
