"""Installing: what decides whether anything is to be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import bootstrap


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stamp's file, elsewhere."""
    path = tmp_path / "installed"
    monkeypatch.setattr(bootstrap, "MARKER", path)
    return path


def test_nothing_is_installed_before_the_first_time(marker: Path) -> None:
    assert bootstrap.installed_extras(bootstrap.stamp()) is None


def test_extras_are_known_until_what_is_needed_changes(marker: Path) -> None:
    marker.write_text(f"{bootstrap.stamp()} dev simplejpeg")
    assert bootstrap.installed_extras(bootstrap.stamp()) == {"dev", "simplejpeg"}
    assert bootstrap.installed_extras("of another setup.py") is None


def test_a_second_call_does_nothing(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*command: str | Path) -> None:
        raise AssertionError(f"ran {command}")

    monkeypatch.setattr(bootstrap, "run", refuse)
    marker.write_text(f"{bootstrap.stamp()} dev")
    bootstrap.main([])
    bootstrap.main(["dev"])


def test_an_address_that_is_not_there_does_not_answer() -> None:
    # port 9 of this machine: refused at once
    assert not bootstrap.answers("http://127.0.0.1:9", seconds=1.0)


def test_the_pinned_torch_is_the_one_that_runs_these_tests() -> None:
    assert bootstrap.installed_torch() in (None, bootstrap.pinned_torch())
