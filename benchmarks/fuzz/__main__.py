"""`python -m benchmarks.fuzz --out benchmarks/results/fuzz.json`: the long run, with its report."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.fuzz.campaigns import (
    Outcome,
    archives,
    bytes_in_shards,
    decoders,
    files,
    silent_libraries,
    tables,
)
from benchmarks.fuzz.served import served_shards
from benchmarks.machine import describe_machine


def run(scale: float, seed: int, folder: Path) -> list[Outcome]:
    """All campaigns; with a scale of 1 more than 2,000 damaged inputs."""
    silent_libraries()
    outcomes: list[Outcome] = []
    for campaign, count in (
        (bytes_in_shards, 1400),
        (decoders, 900),
        (files, 600),
        (archives, 120),
        (served_shards, 216),
        (tables, 160),
    ):
        outcomes += campaign(folder / campaign.__name__, max(8, round(count * scale)), seed)
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts by campaign and outcome, and by kind of damage."""
    return {
        "inputs": len(outcomes),
        "wrong": [asdict(one) for one in outcomes if one.outcome.startswith("WRONG")],
        "campaigns": {
            name: dict(Counter(one.outcome for one in outcomes if one.campaign == name))
            for name in dict.fromkeys(one.campaign for one in outcomes)
        },
        "damages": {
            name: dict(Counter(one.outcome for one in outcomes if one.damage == name))
            for name in dict.fromkeys(one.damage for one in outcomes)
        },
    }


def main() -> None:
    """Run, print the summary, write every input with its outcome; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(arguments.scale, arguments.seed, Path(folder))
    report = {
        "command": f"python -m benchmarks.fuzz --seed {arguments.seed}",
        "machine": describe_machine(),
        "seconds": round(time.perf_counter() - began),
        **summary(outcomes),
    }
    print(json.dumps(report, indent=1))
    if arguments.out:
        rows = [list(asdict(one).values()) for one in outcomes]
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        text = json.dumps(report, indent=1).removesuffix("\n}")
        arguments.out.write_text(f'{text},\n "outcomes": [\n{lines}\n ]\n}}\n')
    sys.exit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    main()
