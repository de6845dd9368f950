"""What README.md shows is what works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from framework.models.describe import describe

README = Path(__file__).resolve().parents[2] / "README.md"


def unread_tubes(recipe: Path, *settings: str) -> list[int]:
    """The tubes that no source gives tokens to: a training ends because they get no gradient."""
    said = describe(str(recipe), settings)
    if "tubes" not in said:  # a model of one tubelet, which every source goes through
        return []
    read = {grid["tube"] for source in said["sources"].values() for grid in source["grids"]}
    return [number for number in range(len(said["tubes"])) if number not in read]


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """The whole recipe that README.md shows, as a file."""
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_of_the_model_that_is_shown_is_trained(shown: Path) -> None:
    assert unread_tubes(shown) == []
    assert unread_tubes(shown, "model={name: tubevit_ti}") == [0, 1, 2]
