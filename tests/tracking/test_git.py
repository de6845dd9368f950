"""The state of the code, from real repositories."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from framework.tracking.git import git_diff, git_state, masked


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for command in (
        ["init", "-q", "-b", "work"],
        ["config", "user.name", "Somebody"],
        ["config", "user.email", "somebody@example.org"],
        ["remote", "add", "origin", "https://user:secret@example.org/code.git"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "code.py").write_text("one\n")
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "commit", "-q", "-m", "first"], check=True)
    return tmp_path


def test_a_clean_repository(repository: Path) -> None:
    state = git_state(repository)
    commit = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert state["commit"] == commit.stdout.strip()
    assert state["branch"] == "work"
    assert state["dirty"] == "false"
    assert state["remote"] == "https://***@example.org/code.git"
    assert git_diff(repository) == ""


def test_a_dirty_repository_gives_a_patch_that_applies(repository: Path) -> None:
    (repository / "code.py").write_text("two\n")
    assert git_state(repository)["dirty"] == "true"
    patch = git_diff(repository)
    assert "-one" in patch
    assert "+two" in patch
    subprocess.run(["git", "-C", str(repository), "checkout", "-q", "code.py"], check=True)
    subprocess.run(["git", "-C", str(repository), "apply"], input=patch, text=True, check=True)
    assert (repository / "code.py").read_text() == "two\n"


def test_a_folder_that_is_not_versioned(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert git_state(tmp_path_factory.mktemp("nowhere")) == {}
    inside = repository / "venv"
    inside.mkdir()
    (inside / "module.py").write_text("")
    assert git_state(inside) == {}, "a package installed below somebody's repository is not its code"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://me:p@ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("at https://token@host failed, http://b:c@d too", "at https://***@host failed, http://***@d too"),
    ],
)
def test_passwords_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected
