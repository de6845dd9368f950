"""Counts against a plain computation, sample by sample."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.errors import DataError
from framework.evaluation.metrics import SourceResult, Tally, hits
from framework.world import World

CPU = torch.device("cpu")


def reference(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """logits (samples, views, classes): everything with loops and float64."""
    names = ("top1", "top5", "top1_softmax", "top5_softmax", "loss")
    sums, per_class = dict.fromkeys(names, 0.0), {}
    for sample, label in zip(logits.astype(np.float64), labels, strict=True):
        probabilities = [np.exp(view - view.max()) / np.exp(view - view.max()).sum() for view in sample]
        mean = sum(sample) / len(sample)
        for scores, suffix in ((mean, ""), (sum(probabilities) / len(sample), "_softmax")):
            order = [int(place) for place in np.argsort(-scores)]
            sums[f"top1{suffix}"] += label in order[:1]
            sums[f"top5{suffix}"] += label in order[:5]
        sums["loss"] += -math.log(np.exp(mean[label]) / np.exp(mean).sum())
        per_class.setdefault(int(label), []).append(int(np.argmax(mean)) == label)
    result = {name: value / len(labels) for name, value in sums.items()}
    result["mean_class_accuracy"] = float(np.mean([np.mean(hit) for hit in per_class.values()]))
    return result


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 40),
    views=st.integers(1, 4),
    classes=st.integers(2, 12),
    batch=st.integers(1, 17),
    seed=st.integers(0, 2**16),
)
def test_batches_of_any_size_give_the_plain_result(
    samples: int, views: int, classes: int, batch: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, views, classes)).astype(np.float32)
    labels = rng.integers(0, classes, samples)
    tally = Tally(classes, CPU)
    for first in range(0, samples, batch):
        rows = np.arange(first, first + batch)
        valid = torch.from_numpy(rows < samples)
        padded = np.minimum(rows, samples - 1)  # what stands in the padding must not matter
        index = torch.from_numpy(np.where(rows < samples, rows, -1))
        tally.add(torch.from_numpy(logits[padded]), torch.from_numpy(labels[padded]), index, valid)
    result = tally.result("source", samples, World())
    assert result.samples == samples
    for name, value in reference(logits, labels).items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-9), name


def test_averages_of_logits_and_of_probabilities_may_differ() -> None:
    """One very sure view outweighs two others in the logits, not in the probabilities."""
    logits = torch.tensor([[[30.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])
    tally = Tally(2, CPU)
    tally.add(logits, torch.tensor([1]), torch.tensor([0]), torch.tensor([True]))
    result = tally.result("source", 1, World())
    assert (result.top1, result.top1_softmax) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_never_right(bad: float) -> None:
    scores = torch.tensor([[bad, 0.0, 1.0], [0.0, bad, 1.0], [5.0, 0.0, 1.0]])
    assert hits(scores, torch.tensor([0, 0, 0]), 1).tolist() == [False, False, True]
    assert hits(scores, torch.tensor([0, 0, 0]), 5).tolist() == [False, False, True]


@pytest.mark.parametrize("index", [[0, 1], [0, 1, 1], [0, 1, 2, 3], [1, 2, 3]])
def test_samples_that_are_missing_or_doubled_are_an_error(index: list[int]) -> None:
    tally = Tally(4, CPU)
    count = len(index)
    labels, valid = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
    tally.add(torch.zeros(count, 1, 4), labels, torch.tensor(index), valid)
    with pytest.raises(DataError, match="source films"):
        tally.result("films", 3, World())


def test_metric_names_are_those_of_the_journal() -> None:
    result = SourceResult(10, 0.1, 0.5, 0.2, 0.6, 2.0, 0.15)
    assert result.metrics() == {
        "top_1": 0.1,
        "top_5": 0.5,
        "top_1_softmax": 0.2,
        "top_5_softmax": 0.6,
        "loss": 2.0,
        "mean_class_accuracy": 0.15,
    }
