"""Killed in the middle of things, a run goes on as if nothing had been; benchmarks/kill_test.py is longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_runs import Kill, killed_run, uninterrupted


@pytest.fixture(scope="module")
def whole(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills."""
    return uninterrupted(recipe_file, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(
    "kills",
    [
        [Kill("write", 1, 100, False), Kill("commit", 0, 2, True)],
        [Kill("manifest", 0, 2, False), Kill("prune", 0, 1, True)],
        [Kill("step", 1, 7, True), Kill("restore", 0, 20, False), Kill("remove", 0, 1, False)],
    ],
    ids=lambda kills: ", ".join(kill.phase for kill in kills),
)
def test_a_killed_run_ends_like_one_that_was_not(
    recipe_file: Path, tmp_path: Path, whole: Path, kills: list[Kill]
) -> None:
    outcome = killed_run(recipe_file, whole, tmp_path / "run", kills)
    assert outcome.problems == []
    assert [kill.phase for kill in outcome.kills] == [kill.phase for kill in kills], "every kill has hit"
