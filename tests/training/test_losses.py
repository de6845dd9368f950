"""Cross-entropy, label smoothing and mixup against torch and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from framework.errors import RecipeError
from framework.training.losses import cross_entropy, draw_mixing, mix_pixels


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
SEEDS = torch.randint(-(2**63), 2**63 - 1, (8,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_is_that_of_torch_and_of_the_formula(logits: torch.Tensor, smoothing: float) -> None:
    loss = cross_entropy(logits, LABELS, smoothing)
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS, label_smoothing=smoothing))
    target = (1 - smoothing) * F.one_hot(LABELS, 5) + smoothing / 5
    torch.testing.assert_close(loss, -(target * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_the_loss_on_mixed_labels(logits: torch.Tensor, smoothing: float) -> None:
    mixing = draw_mixing(0.4, SEEDS, "motion")
    assert mixing is not None
    hard = F.one_hot(LABELS, 5).float()
    swapped = hard[[1, 0, 3, 2, 5, 4, 7, 6]]
    target = mixing.share[:, None] * hard + (1 - mixing.share[:, None]) * swapped
    torch.testing.assert_close(
        cross_entropy(logits, LABELS, smoothing, mixing),
        F.cross_entropy(logits, target, label_smoothing=smoothing),
    )


def test_mixed_pixels_lie_between_those_of_the_pair() -> None:
    pixels = torch.zeros(4, 3, 2, 4, 4, dtype=torch.uint8)
    pixels[1::2] = 200
    mixing = draw_mixing(0.8, SEEDS[:4], "motion")
    assert mixing is not None
    mixed = mix_pixels(pixels, mixing)
    assert mixed.dtype == torch.uint8
    assert mixed.shape == pixels.shape
    share = mixing.share.tolist()
    expected = [200 * (1 - share[0]), 200 * share[1], 200 * (1 - share[2]), 200 * share[3]]
    for row in range(4):
        assert mixed[row].unique().tolist() == [round(expected[row])]


def test_pairs_are_mixed_in_the_same_way_on_any_number_of_ranks() -> None:
    whole = draw_mixing(0.2, SEEDS, "motion")
    assert whole is not None
    assert whole.partner.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert len(set(whole.share.tolist())) == 4, "each pair has a share of its own"
    for ranks in (2, 4):
        parts = [draw_mixing(0.2, part, "motion") for part in SEEDS.chunk(ranks)]
        shares = torch.cat([part.share for part in parts if part is not None])
        assert torch.equal(shares, whole.share)


def test_shares_follow_the_beta_distribution() -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (20000,), generator=torch.Generator().manual_seed(2))
    mixing = draw_mixing(2.0, seeds, "motion")
    assert mixing is not None
    share = mixing.share[::2]
    assert float(share.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(share.var()) == pytest.approx(1 / 20, abs=0.003)  # of Beta(2, 2)


def test_off_and_odd() -> None:
    assert draw_mixing(0.0, SEEDS[:3], "motion") is None
    with pytest.raises(RecipeError, match=r"source motion: mixup needs an even number .* here there are 3"):
        draw_mixing(0.2, SEEDS[:3], "motion")


def test_mixup_takes_the_views_of_another_sample() -> None:
    seeds = torch.arange(12) * 7919
    mixing = draw_mixing(0.4, seeds, "motion", repeats=3)
    assert mixing is not None
    assert mixing.partner.tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    assert torch.equal(mixing.share, mixing.share[mixing.partner])
    assert len(set(mixing.share.tolist())) == 6
    parts = [draw_mixing(0.4, part, "motion", repeats=3) for part in seeds.chunk(2)]
    assert torch.equal(mixing.share, torch.cat([part.share for part in parts if part]))
    with pytest.raises(RecipeError, match="here there are 1"):
        draw_mixing(0.4, seeds[:2], "motion", repeats=2)
