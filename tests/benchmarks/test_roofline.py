"""The predicted step counts the operations that everybody counts, and follows the model's operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.roofline import Gpu, Operator, fused, predict, trace
from benchmarks.step.product import Case, Setting, operations

CASE = Case("b", 539, 8)


def test_products_and_attention_do_three_forward_passes_at_two_per_multiply_add() -> None:
    """All but the tokenizer's, whose pixels need no gradient: 0.3 % of a step."""
    recipe = Setting(torch.device("cpu")).recipe(CASE)
    counted = sum(operator.operations for operator in trace(recipe))
    assert counted == pytest.approx(operations(recipe, training=True), rel=0.005)
    assert counted < operations(recipe, training=True)


def test_a_chain_between_two_products_reads_its_inputs_and_writes_what_is_used_later() -> None:
    product = Operator("mm", 1.0, {1: 10}, {2: 20})
    first = Operator("gelu", 0.0, {2: 20}, {3: 30})
    second = Operator("add", 0.0, {3: 30, 1: 10}, {4: 40})
    kept = Operator("mm", 1.0, {4: 40, 2: 20}, {5: 50})
    assert list(fused([product, first, second, kept])) == [
        ("product", 30),
        ("other", 20 + 10 + 40),
        ("product", 110),
    ]
    kept_too = Operator("mm", 1.0, {4: 40, 3: 30}, {5: 50})
    assert next(fused([first, second, kept_too])) == ("other", 20 + 10 + 30 + 40)


def test_predictions_follow_from_the_rates() -> None:
    slow = Gpu()
    found = predict(CASE, slow)
    assert found.other_compiled_s < found.other_s
    assert found.kernels_compiled < found.kernels
    assert found.share < found.share_compiled < 1
    quick = predict(CASE, replace(slow, bandwidth=2 * slow.bandwidth))
    assert quick.other_s == pytest.approx(found.other_s / 2)
    assert quick.update_s == pytest.approx(found.update_s / 2)
    assert predict(CASE, slow, "DeepSpeed's").update_s == pytest.approx(2 * found.update_s)


def test_attention_copies_no_gradient_twice() -> None:
    """A block's backward pass puts the gradients of queries, keys and values together once."""
    depth = 12
    names = [operator.name for operator in trace(Setting(torch.device("cpu")).recipe(CASE))]
    assert names.count("stack") == depth + 1  # and the losses here
    assert max(names.count("clone"), names.count("cat")) < depth, "those of the tokenizer alone"
