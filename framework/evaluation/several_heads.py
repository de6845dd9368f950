"""What is counted over held-out samples with a class for each of several heads, such as verb and noun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from framework.evaluation.metrics import SourceResult, Tally
from framework.targets import TargetSpec
from framework.world import World

__all__ = ["HeadsResult", "HeadsTally", "joint_hits"]

BEST = 5


@dataclass(frozen=True)
class HeadsResult:
    """The result of one source with several heads; shares are in [0, 1].

    `top1` counts samples for which the best classes of all heads are right (Epic Kitchens' action); `top5`
    those whose classes are among the five best combinations by the product of the heads' probabilities.
    Logits are averaged over the views, in the `_softmax` ones probabilities. `loss` is the sum over heads.
    """

    samples: int
    top1: float
    top5: float
    top1_softmax: float
    top5_softmax: float
    loss: float
    heads: Mapping[str, SourceResult]

    def metrics(self) -> dict[str, float]:
        """The numbers under the names of the journal and of MLflow; those of a head begin with its name."""
        together = {
            "top_1": self.top1,
            "top_5": self.top5,
            "top_1_softmax": self.top1_softmax,
            "top_5_softmax": self.top5_softmax,
            "loss": self.loss,
        }
        for name, result in self.heads.items():
            together |= {f"{name}_{key}": value for key, value in result.metrics().items()}
        return together

    def words(self) -> str:
        """The numbers that a person looks for first."""
        heads = "".join(f", {name} {result.words()}" for name, result in self.heads.items())
        return f"all heads together top-1 {self.top1:.1%}, top-5 {self.top5:.1%}{heads}"


def joint_hits(scores: Sequence[Tensor], labels: Tensor, k: int) -> Tensor:
    """Whether the labels are among the k best combinations of the heads' classes.

    Only the k best classes of each head can be part of them, so no more are combined.

    Args:
        scores: of each head (batch, classes), logarithms of probabilities, which are added.
        labels: (batch, heads).
        k: how many combinations count.

    Returns:
        bool (batch,); False where scores are not all finite.
    """
    rows = len(labels)
    sums = torch.zeros(rows, 1, dtype=scores[0].dtype, device=labels.device)
    right = torch.ones(rows, 1, dtype=torch.bool, device=labels.device)
    finite = torch.ones(rows, dtype=torch.bool, device=labels.device)
    for score, label in zip(scores, labels.unbind(1), strict=True):
        best = score.topk(min(k, score.shape[1]), dim=1)
        sums = (sums.unsqueeze(2) + best.values.unsqueeze(1)).flatten(1)
        hit = (best.indices == label.unsqueeze(1)).unsqueeze(1)
        right = (right.unsqueeze(2) & hit).flatten(1)
        finite &= score.isfinite().all(dim=1)
        kept = sums.topk(min(k, sums.shape[1]), dim=1)
        sums, right = kept.values, right.gather(1, kept.indices)
    return right.any(dim=1) & finite


class HeadsTally:
    """Counts of one source on one rank: of each head, and of all together."""

    def __init__(self, targets: TargetSpec, device: torch.device) -> None:
        self._sizes = targets.sizes
        self._tallies = {
            name: Tally(size, device) for name, size in zip(targets.names, targets.sizes, strict=True)
        }
        self._right = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, index: Tensor, valid: Tensor) -> None:
        """Count a batch: logits (batch, views, classes of all heads), labels (batch, heads)."""
        parts = logits.split(self._sizes, dim=2)
        for tally, part, label in zip(self._tallies.values(), parts, labels.unbind(1), strict=True):
            tally.add(part, label, index, valid)
        labels = labels[valid]
        if len(labels) == 0:
            return
        chosen = [part[valid].double() for part in parts]
        by_logits = [part.mean(dim=1).log_softmax(dim=1) for part in chosen]
        # the logarithm of 0 is no failure of the model
        by_softmax = [part.softmax(dim=2).mean(dim=1).clamp(min=1e-300).log() for part in chosen]
        counts = [joint_hits(scores, labels, k) for scores in (by_logits, by_softmax) for k in (1, BEST)]
        self._right += torch.stack([count.sum().double() for count in counts])

    def result(self, name: str, expected: int, world: World) -> HeadsResult:
        """Sum over the ranks and divide; every rank gets the same result.

        Errors:
            DataError: the ranks together did not see each of the `expected` samples exactly once.
        """
        heads = {head: tally.result(name, expected, world) for head, tally in self._tallies.items()}
        if world.size > 1:
            torch.distributed.all_reduce(self._right)
        top1, top5, top1_softmax, top5_softmax = (self._right / max(1, expected)).tolist()
        loss = sum(result.loss for result in heads.values())
        return HeadsResult(expected, top1, top5, top1_softmax, top5_softmax, loss, heads)
