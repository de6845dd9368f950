"""What a person sees of a running training: a live line on a terminal, a line per logging point elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console

__all__ = ["LiveLine", "format_seconds"]


def format_seconds(seconds: float) -> str:
    """A duration as h:mm:ss."""
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


class LiveLine:
    """Step, losses, samples a second of each source, share of time waiting for data, time left."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._steps = steps
        self._shown = shown
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = sys.stderr.isatty()

    def show(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Show the metrics of a logging point."""
        if not self._shown:
            return
        losses = "  ".join(
            f"{key.split('/')[1]} {value:.4f}"
            for key, value in metrics.items()
            if key.endswith("/loss") and key.count("/") == 2
        )
        rates = "  ".join(
            f"{key.removeprefix('perf/').removesuffix('_per_s')} {value:.3g}/s"
            for key, value in metrics.items()
            if key.endswith("_per_s")
        )
        line = (
            f"step {step}/{self._steps}  loss {metrics['train/loss']:.4f}  ({losses})  {rates}  "
            f"waiting {metrics['data/wait_share']:.0%}  left {format_seconds(seconds_left)}"
        )
        if self._live:
            width = max(20, self._console.width - 1)
            self._console.file.write("\r\x1b[K" + line[:width])
            self._console.file.flush()
        else:
            self._console.print(line, markup=False)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._shown:
            if self._live:
                self._console.file.write("\r\x1b[K")
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Leave the live line standing and go to the next."""
        if self._shown and self._live:
            self._console.file.write("\n")
