"""Mean average precision and verb/noun accuracy against independent computations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from framework.errors import DataError
from framework.evaluation.multi_label import MultiLabelResult, MultiLabelTally, average_precision
from framework.evaluation.run import new_tally
from framework.evaluation.several_heads import HeadsResult, joint_hits
from framework.targets import TargetSpec
from framework.world import World

CPU = torch.device("cpu")


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 60), levels=st.integers(1, 30), seed=st.integers(0, 2**16))
def test_average_precision_is_that_of_scikit_learn(samples: int, levels: int, seed: int) -> None:
    """Few levels make many samples share a score."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (samples, 4)).astype(np.float32)
    applies = rng.random((samples, 4)) < [0.5, 0.1, 0.9, 0.0]
    found = average_precision(scores, applies)
    for number in range(4):
        if applies[:, number].any():
            assert found[number] == pytest.approx(
                average_precision_score(applies[:, number], scores[:, number])
            )
        else:
            assert np.isnan(found[number])


def tally_in_batches(targets: TargetSpec, logits: torch.Tensor, labels: torch.Tensor, batch: int = 5):
    """The result over samples that come in batches, the last of them filled up with what must not count."""
    tally = new_tally(targets, CPU)
    count = len(labels)
    for first in range(0, count, batch):
        rows = torch.arange(first, first + batch)
        valid = rows < count
        there = rows.clamp(max=count - 1)
        tally.add(logits[there], labels[there], torch.where(valid, rows, -1), valid)
    return tally.result("films", count, World())


def test_views_are_averaged_or_the_best_one_taken() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(23, 6, 9)).astype(np.float32) * 3
    labels = (rng.random((23, 9)) < 0.2).astype(np.float32)
    labels[:, 4], labels[7] = 0, 0
    result = tally_in_batches(TargetSpec.multi(9), torch.from_numpy(logits), torch.from_numpy(labels))
    assert isinstance(result, MultiLabelResult)
    present = [number for number in range(9) if labels[:, number].any()]

    def expected(scores: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
        return float(average_precision_score(labels[rows][:, present], scores[rows][:, present]))

    assert result.mean_average_precision == pytest.approx(expected(logits.mean(1)), abs=1e-9)
    by_sigmoid = (1 / (1 + np.exp(-logits))).mean(1)
    assert result.mean_average_precision_sigmoid == pytest.approx(expected(by_sigmoid), abs=1e-9)
    assert result.mean_average_precision_max == pytest.approx(expected(logits.max(1)), abs=1e-9)
    some = labels.any(axis=1)
    assert result.mean_average_precision_labelled == pytest.approx(expected(logits.mean(1), some), abs=1e-9)
    assert result.classes_without_positives == 9 - len(present)
    assert result.average_precision[4] is None
    best = logits.mean(1).argmax(1)
    assert result.hit1 == pytest.approx(float(labels[np.arange(23), best].mean()))
    assert result.metrics()["map"] == result.mean_average_precision


def test_multi_label_samples_must_all_be_there_once() -> None:
    tally = MultiLabelTally(3, CPU)
    tally.add(torch.zeros(2, 1, 3), torch.ones(2, 3), torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool))
    with pytest.raises(DataError, match="source films"):
        tally.result("films", 2, World())


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_the_best_combinations_are_those_of_all_combinations(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = [torch.from_numpy(rng.normal(size=(6, size))) for size in sizes]
    labels = torch.from_numpy(np.stack([rng.integers(0, size, 6) for size in sizes], axis=1))
    for k in (1, 5):
        found = joint_hits(scores, labels, k).tolist()
        for row in range(6):
            everything = itertools.product(*(range(size) for size in sizes))
            ranked = sorted(
                everything, key=lambda c: -sum(float(s[row, i]) for s, i in zip(scores, c, strict=True))
            )
            assert found[row] == (tuple(labels[row].tolist()) in ranked[:k])


def test_heads_are_counted_alone_and_together() -> None:
    logits = torch.full((3, 2, 5), -4.0)  # two views; two verbs, three nouns
    for row, (verb, noun) in enumerate([(0, 2), (1, 0), (1, 1)]):
        logits[row, :, verb] = logits[row, :, 2 + noun] = 4.0
    labels = torch.tensor([[0, 2], [1, 1], [0, 1]])
    result = tally_in_batches(TargetSpec.of_heads({"verb": 2, "noun": 3}), logits, labels)
    assert isinstance(result, HeadsResult)
    assert result.heads["verb"].top1 == pytest.approx(2 / 3)
    assert result.heads["noun"].top1 == pytest.approx(2 / 3)
    assert result.top1 == pytest.approx(1 / 3)
    assert result.top5 == 1.0
    metrics = result.metrics()
    assert metrics["verb_top_1"] == result.heads["verb"].top1
    assert metrics["top_1"] == result.top1
    assert result.loss == pytest.approx(result.heads["verb"].loss + result.heads["noun"].loss)
