"""Names and values fit MLflow's own rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param

from framework.tracking.naming import flatten, parameter_value, safe_name


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
    _validate_metric_name(safe_name(name))
    _validate_param(safe_name(name), "value")


@given(st.text(max_size=400))
def test_a_safe_name_is_stable(name: str) -> None:
    assert safe_name(safe_name(name)) == safe_name(name)


def test_long_names_stay_different() -> None:
    assert safe_name("a" * 300 + "b") != safe_name("a" * 300 + "c")


def test_nested_values_become_dotted_keys() -> None:
    recipe = {
        "model": {"tubes": [{"kernel": [8, 8, 8]}, {"kernel": [1, 16, 16]}], "pool": None},
        "data": {"mixture": {"a": 1}, "empty": {}},
        "train": {"compile": False, "betas": [0.9, 0.999]},
    }
    assert flatten(recipe) == {
        "model.tubes.0.kernel": "[8, 8, 8]",
        "model.tubes.1.kernel": "[1, 16, 16]",
        "model.pool": "none",
        "data.mixture.a": "1",
        "data.empty": "{}",
        "train.compile": "false",
        "train.betas": "[0.9, 0.999]",
    }


def test_long_values_are_cut() -> None:
    assert len(parameter_value("x" * 7000)) == 6000
