"""`make demo`: the whole way on a small scale, from pixels to a table; what is there already is used again.

Runs the commands that a person would type, and shows them.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.errors import DataError, TrainingStopped, TubeworksError
from framework.recipe import load_recipe

__all__ = ["main"]

HOME = Path("demo")
SHARDS, RUN, RESULT = HOME / "shards", HOME / "run", HOME / "result.json"
RANKS = 2
PROMISED = {"motion": 90.0, "digits": 75.0}
"""Top-1 on held-out samples, in per cent; see `recipes/demo.yaml`."""
COLLAPSED = 55.0
"""Shuffled frames may still show the axis of a motion, which leaves one of two directions to guess: 50 %."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Make the data, train, evaluate twice, print; leaves with an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _demo()
    except TubeworksError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; `make demo` goes on from here\n")
        sys.exit(130)


def _demo() -> None:
    start = time.monotonic()
    if all((SHARDS / split / "manifest.json").is_file() for split in ("train", "val")):
        logger.info("data: %s is there already", SHARDS)
    else:
        # what a call that was broken off left behind
        shutil.rmtree(SHARDS, ignore_errors=True)
        _tubeworks("data", "synth", "--out", str(SHARDS))
    if _trained():
        logger.info("training: %s is finished already", RUN)
    else:
        _tubeworks("train", "demo", "--ranks", str(RANKS), "--run", str(RUN))
    results = _results()
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    sys.stdout.write("\n" + table(results) + "\n")
    sys.stdout.write(f"\nall of it took {minutes} min {seconds} s. Where to look:\n")
    sys.stdout.write(f"  {RUN}/recipe.yaml, journal.jsonl, pictures/, evaluations/, checkpoints/\n")
    sys.stdout.write(f"  .venv/bin/mlflow ui --backend-store-uri sqlite:///{HOME}/mlflow.db\n")
    sys.stdout.write("  and then http://127.0.0.1:5000/#/experiments/1?workflowType=machine_learning\n")
    check(results)


def _trained() -> bool:
    """Whether the run is the demo's recipe as it is now, trained to its last step."""
    if not (RUN / "recipe.yaml").is_file():
        return False
    recipe = load_recipe("demo").recipe
    last = RUN / "checkpoints" / f"step-{recipe.train.steps:08d}" / "MANIFEST.json"
    return last.is_file() and load_recipe(str(RUN / "recipe.yaml")).recipe == recipe


def _tubeworks(*arguments: str, capture: bool = False) -> str:
    """Run a command of ours as a person would, on this terminal; returns its output where it is captured."""
    logger.info("\n$ tubeworks %s", shlex.join(arguments))
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        if done.returncode > 128:
            logger.info("stopped; `make demo` goes on from here")
        sys.exit(done.returncode)
    return done.stdout or ""


def _results() -> dict[str, Any]:
    """Evaluations with frames in order and shuffled, made anew when there is a newer checkpoint."""
    newest = max(path.name for path in (RUN / "checkpoints").glob("step-*"))
    if RESULT.is_file():
        known = json.loads(RESULT.read_text(encoding="utf-8"))
        if known["checkpoint"] == newest:
            return known
    evaluate = ("eval", str(RUN), "--ranks", str(RANKS), "--json")
    results = {
        "checkpoint": newest,
        "ordered": json.loads(_tubeworks(*evaluate, capture=True)),
        "shuffled": json.loads(_tubeworks(*evaluate, "--shuffle-frames", capture=True)),
    }
    RESULT.write_text(json.dumps(results, indent=2), encoding="utf-8")
    return results


def _top_1(results: dict[str, Any], order: str, source: str) -> float:
    return 100 * float(results[order]["sources"][source]["top1"])


def table(results: dict[str, Any]) -> str:
    """Top-1 per source on held-out samples, beside guessing and beside shuffled frames."""
    rows: list[Sequence[str]] = [("held-out, top-1", "accuracy", "guessing", "frames shuffled")]
    for source, guess in (("motion", 12.5), ("digits", 10.0)):
        shuffled = f"{_top_1(results, 'shuffled', source):.1f} %" if source == "motion" else "one frame"
        rows.append((source, f"{_top_1(results, 'ordered', source):.1f} %", f"{guess} %", shuffled))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )


def check(results: dict[str, Any]) -> None:
    """Compare with what the recipe promises.

    Errors:
        TrainingStopped: an accuracy is below its promise, or shuffled frames do not matter.
        DataError: a source is missing in the results.
    """
    if missing := PROMISED.keys() - results["ordered"]["sources"].keys():
        raise DataError(f"the evaluation has no {', '.join(sorted(missing))}")
    for source, promised in PROMISED.items():
        if _top_1(results, "ordered", source) < promised:
            raise TrainingStopped(f"{source} is below the {promised:g} % that recipes/demo.yaml promises")
    if _top_1(results, "shuffled", "motion") > COLLAPSED:
        raise TrainingStopped(
            f"motion stays above {COLLAPSED:g} % with its frames shuffled: it does not read time"
        )


if __name__ == "__main__":
    main()
