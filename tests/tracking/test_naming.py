"""Names and values fit MLflow's own rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param

from framework.tracking.naming import parameter_value, safe_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/loss", "train/loss"),
        ("top@1", "top_1"),
        ("a(b)%", "a_b__"),
        ("/a//b/", "a/b"),
        ("a/../b", "a/__/b"),
        ("", "_"),
        ("größe", "größe"),
        ("a:b", "a_b"),
    ],
)
def test_names_become_legal_and_stay_readable(name: str, expected: str) -> None:
    assert safe_name(name) == expected


@given(st.text(max_size=400))
def test_mlflow_accepts_every_safe_name(name: str) -> None:
    legal = safe_name(name)
    assert 0 < len(legal) <= 250
    _validate_metric_name(legal)  # which raises where MLflow would refuse it
    _validate_param(legal, "value")


@given(st.text(max_size=400))
def test_a_safe_name_is_stable(name: str) -> None:
    assert safe_name(safe_name(name)) == safe_name(name)


def test_long_names_stay_different() -> None:
    assert safe_name("a" * 300 + "b") != safe_name("a" * 300 + "c")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "none"),
        (False, "false"),
        ([0.9, 0.999], "[0.9, 0.999]"),
        ({}, "{}"),
        ("text", "text"),
        (1e-4, "0.0001"),
    ],
)
def test_values_become_readable_text(value: object, expected: str) -> None:
    assert parameter_value(value) == expected


def test_long_values_are_cut() -> None:
    assert len(parameter_value("x" * 7000)) == 6000
