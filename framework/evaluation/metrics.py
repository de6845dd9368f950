"""What is counted over held-out samples, and how counts of several ranks become one result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional

from framework.errors import DataError
from framework.world import World

__all__ = ["SourceResult", "Tally", "hits"]


@dataclass(frozen=True)
class SourceResult:
    """The result of one source; shares are in [0, 1].

    `top1` and `top5` rank the classes by logits averaged over the views of a sample, the `_softmax` ones by
    averaged probabilities. `loss` is the cross entropy of the averaged logits, in nats.
    `mean_class_accuracy` is the top-1 share of each class that has samples, averaged over those classes.
    """

    samples: int
    top1: float
    top5: float
    top1_softmax: float
    top5_softmax: float
    loss: float
    mean_class_accuracy: float

    def metrics(self) -> dict[str, float]:
        """The numbers under the names of the journal and of MLflow."""
        return {
            "top_1": self.top1,
            "top_5": self.top5,
            "top_1_softmax": self.top1_softmax,
            "top_5_softmax": self.top5_softmax,
            "loss": self.loss,
            "mean_class_accuracy": self.mean_class_accuracy,
        }

    def words(self) -> str:
        """The numbers that a person looks for first."""
        return f"top-1 {self.top1:.1%}, top-5 {self.top5:.1%}"


def hits(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k best classes: (batch, classes), (batch,) -> bool (batch,).

    With fewer classes than k every sample is a hit. Scores that are not all finite are none: a model that
    diverged must not look right.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1) & scores.isfinite().all(dim=1)


class Tally:
    """Counts of one source on one rank; sums of floating point numbers are kept in float64."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._right = torch.zeros(classes, dtype=torch.int64, device=device)
        self._seen = torch.zeros(classes, dtype=torch.int64, device=device)
        self._places = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor, index: Tensor, valid: Tensor) -> None:
        """Count a batch: logits (batch, views, classes), labels, index and valid (batch,)."""
        logits, labels, index = logits[valid].double(), labels[valid], index[valid]
        if len(labels) == 0:
            return
        by_logits = logits.mean(dim=1)  # (batch, classes)
        by_softmax = logits.softmax(dim=2).mean(dim=1)
        right = hits(by_logits, labels, 1)
        loss = functional.cross_entropy(by_logits, labels, reduction="sum")
        counts = [right, hits(by_logits, labels, 5), hits(by_softmax, labels, 1), hits(by_softmax, labels, 5)]
        self._sums += torch.stack([*(count.sum().double() for count in counts), loss])
        self._seen += torch.bincount(labels, minlength=len(self._seen))
        self._right += torch.bincount(labels[right], minlength=len(self._right))
        self._places += index.sum()

    def result(self, name: str, expected: int, world: World) -> SourceResult:
        """Sum over the ranks and divide; every rank gets the same result.

        Errors:
            DataError: the ranks together did not see each of the `expected` samples exactly once.
        """
        if world.size > 1:
            for counts in (self._sums, self._right, self._seen, self._places):
                torch.distributed.all_reduce(counts)
        samples, places = int(self._seen.sum()), int(self._places)
        if samples != expected or places != expected * (expected - 1) // 2:
            raise DataError(
                f"source {name}: {samples} samples were evaluated where the manifest has {expected}, or some "
                "twice and others not at all; the numbers would be wrong"
            )
        top1, top5, top1_softmax, top5_softmax, loss = (self._sums / max(1, samples)).tolist()
        present = self._seen > 0
        per_class = self._right[present].double() / self._seen[present]
        mean_class = float(per_class.mean()) if len(per_class) else 0.0
        return SourceResult(samples, top1, top5, top1_softmax, top5_softmax, loss, mean_class)
