"""What is counted over held-out samples to which any number of classes apply: mean average precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from framework.errors import DataError
from framework.wording import counted
from framework.world import World

__all__ = ["MultiLabelResult", "MultiLabelTally", "average_precision"]


@dataclass(frozen=True)
class MultiLabelResult:
    """The result of one multi-label source; shares are in [0, 1].

    Mean average precision is over the classes that apply to some sample; `classes_without_positives` are the
    others. `mean_average_precision` ranks samples by logits averaged over their views, `_sigmoid` by averaged
    probabilities, `_max` by the largest of the views. `_labelled` is the first without the samples to which
    no class applies, which is what the official script of Charades computes. `hit1` is the share of samples
    whose best class applies, `loss` the binary cross entropy of the averaged logits, in nats, a mean over
    classes.
    """

    samples: int
    mean_average_precision: float
    mean_average_precision_sigmoid: float
    mean_average_precision_max: float
    mean_average_precision_labelled: float
    hit1: float
    loss: float
    classes_without_positives: int
    average_precision: tuple[float | None, ...]
    """Of each class by averaged logits; None where it applies to no sample."""

    def metrics(self) -> dict[str, float]:
        """The numbers under the names of the journal and of MLflow."""
        return {
            "map": self.mean_average_precision,
            "map_sigmoid": self.mean_average_precision_sigmoid,
            "map_max": self.mean_average_precision_max,
            "map_labelled": self.mean_average_precision_labelled,
            "hit_1": self.hit1,
            "loss": self.loss,
            "classes_without_positives": float(self.classes_without_positives),
        }

    def words(self) -> str:
        """The numbers that a person looks for first."""
        without = self.classes_without_positives
        left_out = f", {counted(without, 'class')} without positives left out" if without else ""
        return f"mAP {self.mean_average_precision:.1%} ({self.mean_average_precision_max:.1%} by the " + (
            f"best view){left_out}"
        )


def average_precision(scores: NDArray[np.floating], applies: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The average precision of each class, NaN for a class without positives.

    The sum over the ranked samples of precision times the rise of recall, not interpolated. Samples with
    equal scores share one rank, so that their order does not matter; what is not a number ranks last.

    Args:
        scores: (samples, classes), larger is more likely.
        applies: (samples, classes).
    """
    result = np.full(scores.shape[1], np.nan)
    ranked_scores = np.nan_to_num(scores.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    for number in np.flatnonzero(applies.any(axis=0)):
        order = np.argsort(-ranked_scores[:, number], kind="stable")
        ranked, right = ranked_scores[order, number], applies[order, number]
        last = np.append(ranked[1:] != ranked[:-1], True)  # of samples that share a score
        found = np.cumsum(right)[last]
        precision = found / (np.flatnonzero(last) + 1)
        result[number] = float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])
    return result


class MultiLabelTally:
    """Scores and labels of one source on one rank, kept until the end: ranking needs all of them.

    They take 32 bytes for each sample and class, on every rank at the end.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._classes = classes
        self._device = device
        self._rows: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, index: Tensor, valid: Tensor) -> None:
        """Count a batch: logits (batch, views, classes), labels (batch, classes), index, valid (batch,)."""
        logits = logits.float()
        parts = [logits.mean(dim=1), logits.sigmoid().mean(dim=1), logits.amax(dim=1), labels.float()]
        place = torch.where(valid, index, -1).to(logits.device, torch.float64)
        self._rows.append(torch.cat([part.double() for part in parts] + [place.unsqueeze(1)], dim=1).cpu())

    def result(self, name: str, expected: int, world: World) -> MultiLabelResult:
        """Put the ranks' samples together; every rank gets the same result.

        Errors:
            DataError: the ranks together did not see each of the `expected` samples exactly once.
        """
        rows = torch.cat(self._rows) if self._rows else torch.zeros(0, 4 * self._classes + 1)
        if world.size > 1:  # every rank has as many batches, of the same size
            mine = rows.to(self._device)
            shares = [torch.empty_like(mine) for _ in range(world.size)]
            torch.distributed.all_gather(shares, mine)
            rows = torch.cat(shares).cpu()
        rows = rows[rows[:, -1] >= 0]
        rows = rows[rows[:, -1].argsort()]
        if rows[:, -1].tolist() != list(range(expected)):
            raise DataError(
                f"source {name}: {len(rows)} samples were evaluated where the manifest has {expected}, or "
                "some twice and others not at all; the numbers would be wrong"
            )
        by_logits, by_sigmoid, by_maximum, labels = rows[:, :-1].split(self._classes, dim=1)
        applies = labels.numpy() > 0
        each = average_precision(by_logits.numpy(), applies)
        some = applies.any(axis=1)
        hits = labels.gather(1, by_logits.argmax(dim=1, keepdim=True))[:, 0]
        finite = by_logits.isfinite().all(dim=1)  # a model that diverged must not look right
        return MultiLabelResult(
            samples=expected,
            mean_average_precision=_mean(each),
            mean_average_precision_sigmoid=_mean(average_precision(by_sigmoid.numpy(), applies)),
            mean_average_precision_max=_mean(average_precision(by_maximum.numpy(), applies)),
            mean_average_precision_labelled=_mean(average_precision(by_logits.numpy()[some], applies[some])),
            hit1=float((hits * finite).sum() / max(1, expected)),
            loss=float(functional.binary_cross_entropy_with_logits(by_logits, labels)),
            classes_without_positives=int(np.isnan(each).sum()),
            average_precision=tuple(None if np.isnan(value) else float(value) for value in each),
        )


def _mean(values: NDArray[np.float64]) -> float:
    """Over the classes that have positives; 0 if none has."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else 0.0
