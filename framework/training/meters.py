"""Sums over the steps between two logging points, kept on the device so that no step waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.targets import TargetSpec
from framework.training.accuracy import accuracy_names, right_answers
from framework.training.distributed import Peers

__all__ = ["Meters"]


class Meters:
    """Losses and hits per source, time spent waiting for data, and the stages of the data workers."""

    def __init__(self, sources: Mapping[str, TargetSpec | None], device: torch.device) -> None:
        """Start; a source without targets has losses alone."""
        self._targets = dict(sources)
        self._names = {name: accuracy_names(targets) if targets else [] for name, targets in sources.items()}
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start the next interval."""
        self._sums = {
            name: torch.zeros(2 + len(names), dtype=torch.float64, device=self._device)
            for name, names in self._names.items()
        }
        self._steps = 0
        self._waited = 0.0
        self._stages: dict[str, float] = {}
        self._begin = time.perf_counter()

    def add(self, source: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a micro-batch of a source: mean loss, (batch, classes) logits, labels as of `Group`."""
        targets = self._targets[source]
        hits = right_answers(targets, logits, labels).sum(dim=1) if targets else loss.new_zeros(0)
        count = torch.full((1,), labels.shape[0], dtype=torch.float64, device=loss.device)
        self._sums[source] += torch.cat([loss.detach().double() * count, count, hits.double()])

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

    def state(self) -> dict[str, Any]:
        """The sums of the interval so far, on this rank; times are left out."""
        return {
            "steps": self._steps,
            "sums": {name: sums.tolist() for name, sums in self._sums.items()},
        }

    def restore(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on with an interval; sums of another number of ranks are all put on rank 0."""
        if len(states) == ranks:
            states = [states[rank]]
        elif rank > 0:
            states = []
        for state in states:
            self._steps = int(state["steps"])
            for name, sums in self._sums.items():
                sums += torch.tensor(state["sums"][name], dtype=torch.float64).to(self._device)

    def collect(self, peers: Peers, weights: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the interval over all ranks; times are this rank's own."""
        totals = peers.sum(torch.cat([sums.cpu() for sums in self._sums.values()]))
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        metrics: dict[str, float] = {"train/loss": 0.0}
        shares = totals.split([len(sums) for sums in self._sums.values()])
        for (name, names), share in zip(self._names.items(), shares, strict=True):
            loss, count, *hits = share.tolist()
            metrics["train/loss"] += weights[name] * loss / count
            metrics[f"train/{name}/loss"] = loss / count
            metrics |= {f"train/{name}/{key}": right / count for key, right in zip(names, hits, strict=True)}
            metrics[f"perf/{name}_per_s"] = count / seconds
        metrics["perf/step_s"] = seconds / max(1, self._steps)
        metrics["data/wait_share"] = min(1.0, self._waited / seconds)
        for stage, value in self._stages.items():
            metrics[f"data/{stage}_s"] = value / max(1, self._steps)
        return metrics
