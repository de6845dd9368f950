"""YAML as recipes need it: YAML 1.2, with lines, and nothing that surprises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.recipe.document import emit, parse, plain

PRINTABLE = st.text(st.characters(codec="utf-8"), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | PRINTABLE
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PRINTABLE, inner, max_size=3)
)


def read(text: str) -> Any:
    node, problems = parse(text, "file.yaml")
    assert not problems, problems
    assert node is not None
    return plain(node)


def complaints(text: str) -> list[str]:
    return [str(problem) for problem in parse(text, "file.yaml")[1]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3e5", 3e5),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", 16),
        ("0o17", 15),
        ("017", 17),
        ("-3", -3),
        ("true", True),
        ("~", None),
        ("'1'", "1"),
        ('"true"', "true"),
    ],
)
def test_plain_values_follow_yaml_1_2(text: str, value: object) -> None:
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@given(st.dictionaries(PRINTABLE, VALUES, max_size=4).filter(bool))
def test_what_is_emitted_is_read_back_exactly(value: dict[str, Any]) -> None:
    assert repr(read(emit(value))) == repr(value)


@given(st.text(st.sampled_from("ab01.: -[]{},#&*!|>'\"%@`?\n\t~\x07\ufeffé"), max_size=40))
def test_no_text_breaks_the_parser(text: str) -> None:
    node, problems = parse(text, "file.yaml")
    assert problems or node is None or plain(node) is not None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3\n", "file.yaml:3: a: this key stands twice (first in line 1)"),
        ("a:\n\t- 1\n", "file.yaml:2: not YAML: a tab stands where YAML wants spaces"),
        ("a: &x 1\nb: 2\n", "file.yaml:1: a: anchors and aliases (`&x`)"),
        ("a: 1\nb:\n  c: *x\n", "file.yaml:3: b.c: anchors and aliases (`*x`)"),
        ("a: !!python/object:os.system {}\n", "file.yaml:1: a: tags ("),
        ("a: 1\n---\nb: 2\n", "file.yaml:2: a second document"),
        ("a: [1, 2\nb: 3\n", "file.yaml:2: not YAML"),
        ("? [a, b]\n: 1\n", "file.yaml:1: a key must be plain text"),
        ("a: " + "[" * 5000, "nested deeper than"),
        ("a: \x00", "not a text file"),
    ],
)
def test_what_is_refused_says_where(text: str, complaint: str) -> None:
    found = complaints(text)
    assert len(found) == 1
    assert complaint in found[0]


def test_values_know_their_line() -> None:
    node, _ = parse("a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - e: 4\n", "file.yaml")
    assert node is not None
    assert isinstance(node.value, dict)
    b = node.value["b"]
    assert isinstance(b.value, dict)
    d = b.value["d"]
    assert isinstance(d.value, list)
    assert [str(place.origin) for place in (b, b.value["c"], d, d.value[1])] == [
        "file.yaml:2",
        "file.yaml:3",
        "file.yaml:4",
        "file.yaml:6",
    ]
