"""How well a plan shuffles, in one number: against a true random order, on the worst data there is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from framework.data.plan import Plan

__all__ = ["shuffle_score"]


def shuffle_score(
    plan: Plan,
    name: str,
    total: int,
    *,
    classes: int,
    windows: Sequence[int] = (1, 8, 64),
    samples: int = 24,
    labels: NDArray[np.int64] | None = None,
) -> dict[int, float]:
    """The score of a source for windows of so many steps: 1 is as mixed as a random order, 0 not at all.

    `labels` are the classes of its samples, each of which occurs. Without them it is the score of the worst
    data, which are sorted by class: sample i of `total` has class i * classes // total. In each of `samples`
    windows over the first epoch, the classes' counts are compared with their shares by Pearson's statistic X2
    (Pearson 1900). A random order without replacement gives X2 = (classes - 1) (total - n) / (total - 1) on
    average for a window of n samples; the score is that number divided by the mean of what the plan gives, at
    most 1. It bounds what an optimizer notices: how far the mean gradient of a window is from that of all.
    """
    count = plan.counts[name]
    if labels is None:
        classes = min(classes, total)  # each occurs
        labels = np.arange(total) * classes // total
    shares = np.bincount(labels, minlength=classes) / total
    steps = max(1, total // count)
    scores = {}
    for window in windows:
        length = min(window, steps)
        starts = np.linspace(0, steps - length, samples).astype(int)
        found = []
        for start in starts.tolist():
            steps_of = [plan.of_step(name, step).index for step in range(start, start + length)]
            counts = np.bincount(labels[np.concatenate(steps_of)], minlength=classes)
            even = counts.sum() * shares
            found.append(float(((counts - even) ** 2 / even).sum()))
        drawn = length * count
        random = (classes - 1) * (total - drawn) / max(1, total - 1)
        # a window that holds all samples is as even as they are, in any order
        scores[window] = min(1.0, (random + 1e-9) / (float(np.mean(found)) + 1e-9))
    return scores
