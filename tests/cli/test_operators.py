"""The tables of docs/operators.md list what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from framework import errors
from framework.training.run_place import OWN_NAMES
from framework.training.supervision import GOES_ON
from launch.preflight import BAD_NODE, NOT_READY

OPERATORS = Path(__file__).resolve().parents[2] / "docs" / "operators.md"


def first_column(heading: str) -> list[str]:
    """The cells of the first column of the table under a heading."""
    _, _, after = OPERATORS.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    section = after.partition("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    assert cells, f"no table under {heading}"
    return cells[1:]


def test_every_exit_code_has_its_line() -> None:
    cells = first_column("Exit codes")
    assert cells.pop() == "128 + n"
    kinds = [getattr(errors, name) for name in errors.__all__]
    codes = {kind.exit_code for kind in kinds} | {0, GOES_ON, BAD_NODE, NOT_READY}
    assert sorted(map(int, cells)) == sorted(codes)


def test_every_file_of_a_run_has_its_line() -> None:
    cells = first_column("The run folder")
    names = {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]*)`", cell)}
    assert {name for name in OWN_NAMES if not any(one.partition("/")[0] == name for one in names)} == set()
    assert "git-attempt-N.diff" in names, "of attempts after the first (framework.tracking.mirror)"
