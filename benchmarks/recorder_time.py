"""`tubeworks train …` that also writes down how long each step spends on recording: for `mlflow_outage`.

    RECORDER_TIMES=times.txt python -m benchmarks.recorder_time train RECIPE --run RUN

Whatever tracking can cost a training happens in the calls that the step loop makes to its recorder (journal,
MLflow mirror, system metrics, live line). One line a step: its number, seconds since 1970 at its end, seconds
of those calls by the clock, and processor seconds of the loop's own thread in them: these leave out waiting,
and what other work on the machine takes away.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework.training import loop
from launch.cli import main

__all__ = ["TimedRecorder", "read_times"]


class TimedRecorder(loop.Recorder):
    """Adds up what the calls of a step take; `saved` is the last of them."""

    _lines: list[str]
    _wall = _processor = 0.0
    _step = 0

    def _timed(self, call: Callable[..., None], *arguments: Any) -> None:
        wall, processor = time.perf_counter(), time.thread_time()
        try:
            call(*arguments)
        finally:
            self._wall += time.perf_counter() - wall
            self._processor += time.thread_time() - processor

    def fed(self, step: int, micro_batches: Any) -> None:
        """See `Recorder.fed`."""
        self._step = step + 1
        self._timed(super().fed, step, micro_batches)

    def log(self, step: int, metrics: Any) -> None:
        """See `Recorder.log`."""
        self._timed(super().log, step, metrics)

    def saved(self, checkpoints: Any) -> None:
        """See `Recorder.saved`."""
        self._timed(super().saved, checkpoints)
        self._lines.append(f"{self._step} {time.time()} {self._wall} {self._processor}\n")
        self._wall = self._processor = 0.0

    def close(self, status: Any) -> None:
        """See `Recorder.close`; the times are written before MLflow is waited for."""
        Path(os.environ["RECORDER_TIMES"]).write_text("".join(self._lines), encoding="utf-8")
        super().close(status)

    def _open(self, attempt: int) -> None:
        self._lines = []
        super()._open(attempt)


def read_times(path: Path) -> dict[int, tuple[float, float, float]]:
    """Of each step: when it ended, seconds of recording, and processor seconds of it."""
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {int(step): (float(end), float(wall), float(own)) for step, end, wall, own in rows}


if __name__ == "__main__":
    loop.Recorder = TimedRecorder
    main()
