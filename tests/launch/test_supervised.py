"""The exit codes of supervised ranks: what all decided together is for rank 0 to report."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import CheckpointError, PeerLost, TubeworksError
from framework.world import World
from launch.supervised import VARIABLE, exit_code_of


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose ranks a job supervises."""
    monkeypatch.setenv(VARIABLE, str(tmp_path.resolve()))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return tmp_path


def code_of(error: TubeworksError, run: Path, rank: int = 1) -> int:
    return exit_code_of(error, error.exit_code, World(rank, 2, rank, 2), run)


def test_what_all_decided_together_is_told_by_rank_0(run: Path) -> None:
    error = CheckpointError("the disk is full")
    assert code_of(error, run, rank=0) == CheckpointError.exit_code
    assert code_of(error, run) == 0


@pytest.mark.parametrize("code", [PeerLost.exit_code, 60])
def test_what_a_rank_met_alone_is_told_by_itself(
    run: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(PeerLost, "exit_code", code)
    assert code_of(PeerLost("rank 0 is gone"), run) == code
    assert code_of(TubeworksError("it is this rank's own"), run) == TubeworksError.exit_code
