"""Sums over the steps between two logging points, kept on the device so that no step waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from framework.training.distributed import Peers

__all__ = ["Meters"]


class Meters:
    """Losses and hits per source, time spent waiting for data, and the stages of the data workers."""

    def __init__(self, sources: Iterable[str], device: torch.device) -> None:
        self._sources = tuple(sources)
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start the next interval."""
        self._sums = {
            name: torch.zeros(3, dtype=torch.float64, device=self._device) for name in self._sources
        }
        self._steps = 0
        self._waited = 0.0
        self._stages: dict[str, float] = {}
        self._begin = time.perf_counter()

    def add(self, source: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a micro-batch of a source: mean loss, (batch, classes) logits, (batch,) labels."""
        hits = (logits.argmax(dim=1) == labels).sum()
        count = labels.shape[0]
        self._sums[source] += torch.stack(
            [loss.detach().double() * count, hits.double(), torch.full_like(hits, count).double()]
        )

    def step_done(self, waited: float, stages: Iterable[Mapping[str, float]]) -> None:
        """Count a step: seconds waited for its data, and what its workers spent on each stage."""
        self._steps += 1
        self._waited += waited
        for seconds in stages:
            for stage, value in seconds.items():
                self._stages[stage] = self._stages.get(stage, 0.0) + value

    def leave_out(self, seconds: float) -> None:
        """Time that saving and evaluating took is no time of the steps."""
        self._begin += seconds

    def collect(self, peers: Peers, weights: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the interval over all ranks; times are this rank's own."""
        totals = peers.sum(torch.stack([self._sums[name].cpu() for name in self._sources]))  # (sources, 3)
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        metrics: dict[str, float] = {"train/loss": 0.0}
        for name, (loss, hits, count) in zip(self._sources, totals.tolist(), strict=True):
            metrics["train/loss"] += weights[name] * loss / count
            metrics[f"train/{name}/loss"] = loss / count
            metrics[f"train/{name}/top_1"] = hits / count
            metrics[f"perf/{name}_per_s"] = count / seconds
        metrics["perf/step_s"] = seconds / max(1, self._steps)
        metrics["data/wait_share"] = min(1.0, self._waited / seconds)
        for stage, value in self._stages.items():
            metrics[f"data/{stage}_s"] = value / max(1, self._steps)
        return metrics
