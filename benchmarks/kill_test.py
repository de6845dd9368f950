"""Kill a training on two ranks at random moments, again and again, and compare how it ends.

    python -m benchmarks.kill_test [--runs 60] [--seed 0] [--out DIR] [--result FILE]

Each run is killed (SIGKILL) once to four times, a random rank or both at once: in its start, while it
restores, in a step, while it copies, writes, syncs, commits or prunes a checkpoint, and at plain random
moments. Then it is left alone until it ends. Its loss curve and every bit of its last checkpoint (weights,
averages, moments, buffers) must equal those of the run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))


def main() -> None:
    """Make the data, kill, compare, report; leaves with 1 if a run ended otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the runs go; by default a temporary folder")
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = kill_runs(options.out or Path(temporary), options.runs, options.seed, options.result)
    print(json.dumps(figures, indent=2))
    if figures["runs_that_differ"]:
        sys.exit(1)


def kill_runs(home: Path, runs: int, seed: int, result: Path | None) -> dict[str, object]:
    """Do all runs; the figures are written after each, so that a broken-off test has some, too."""
    from conftest import RECIPE
    from kill_runs import PHASES, counted, draw_kill, killed_run, uninterrupted

    from data_tools.synth import SynthOptions, synthesize

    home.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Any] = {"train_videos": 24, "val_videos": 8, "train_images": 24, "val_images": 10}
    synthesize(SynthOptions(home / "shards", size=16, frames=6, **counts))
    recipe = home / "tiny.yaml"
    recipe.write_text(RECIPE.format(shards=home / "shards"), encoding="utf-8")
    whole = {mode: uninterrupted(recipe, home / f"whole-{mode}", f"checkpoint.mode={mode}") for mode in MODES}
    draws, outcomes, began = random.Random(seed), [], time.monotonic()
    figures: dict[str, object] = {}
    for number in range(runs):
        phases = [PHASES[number % len(PHASES)], *draws.choices(PHASES, k=draws.choice((0, 0, 1, 2)))]
        if phases[0] == "restore":  # there must be something to restore
            phases.insert(0, "committed")
        mode = MODES[number % 4 == 3]
        run = home / f"run-{number}"
        kills = [draw_kill(phase, draws) for phase in phases]
        outcomes.append(killed_run(recipe, whole[mode], run, kills, f"checkpoint.mode={mode}"))
        if not outcomes[-1].problems:
            shutil.rmtree(run)
            shutil.rmtree(run.with_name(f"{run.name}-logs"))
        figures = {
            "command": f"python -m benchmarks.kill_test --runs {runs} --seed {seed}",
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "runs": len(outcomes),
            "runs_killed": sum(bool(one.kills) for one in outcomes),
            "kills": sum(len(one.kills) for one in outcomes),
            "attempts": sum(one.attempts for one in outcomes),
            "runs_that_differ": sum(bool(one.problems) for one in outcomes),
            "problems": [problem for one in outcomes for problem in one.problems],
            "kills_by_phase": counted(outcomes),
            "seconds": round(time.monotonic() - began),
        }
        if result:
            result.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


MODES = ("async", "sync")


if __name__ == "__main__":
    main()
