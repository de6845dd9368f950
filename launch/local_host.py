"""`tubeworks launch submit --local`: the supervisor's loop with ranks as processes of this machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from launch.local import run_ranks
from launch.requeue import Cause
from launch.submission import Submission, launch_folder
from launch.supervised import VARIABLE
from launch.supervisor import rank_environment, supervise

__all__ = ["LocalHost", "supervise_here"]


class LocalHost:
    """This machine; a signal means that whoever is here wants the run to end."""

    def __init__(self, run: Path, submission: Submission) -> None:
        self.job_id = f"local-{platform.node()}-{os.getpid()}"
        self.restart = 0
        self.nodes = platform.node()
        self._run, self._ranks = run, submission.ranks

    def run_ranks(self) -> int:
        """Start the ranks and wait for them; rank 0 speaks on this terminal."""
        recipe = launch_folder(self._run) / "recipe.yaml"
        return run_ranks(["train", str(recipe), "--run", str(self._run)], self._ranks, self._run / "logs")

    def why(self) -> Cause | None:
        """Rank 0 knows why it stopped, nobody else does."""
        return None

    def start_again(self) -> bool:
        """This process goes on with it."""
        self.restart += 1
        return True

    def tell(self, text: str) -> None:
        """It is on the terminal already."""


def supervise_here(submission: Submission) -> int:
    """Attempts at a run on this machine until it is finished or given up; the exit code."""
    run = Path(submission.run)
    os.environ.update(rank_environment(run, submission), **{VARIABLE: str(run)})
    os.chdir(run / "code")
    return supervise(run, LocalHost(run, submission))
