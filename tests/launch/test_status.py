"""`launch status` without Slurm: what the two ledgers of a run folder say, shown together."""

from __future__ import annotations

import json
import time
from pathlib import Path

from launch.status import show_status, status_of
from launch.submission import Submission, begin_attempt, end_attempt, write_submission

RECIPE = """\
name: tiny
model: {name: vit_ti}
data:
  sources: {digits: {path: shards, kind: image, classes: 10, size: 16}}
  mixture: {digits: 8}
optimizer: {lr: 1e-3}
train: {steps: 40}
"""


def training(started: float, **facts: object) -> dict[str, object]:
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)), **facts}


def test_the_attempts_of_job_and_ranks_stand_together(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write_submission(Submission(run=str(tmp_path), name="tiny", local=True))
    before = training(time.time() - 3600, attempt=0, start_step=0, end_step=4, cause="stopped by SIGINT")
    first = end_attempt(tmp_path, begin_attempt(tmp_path, "local", 0, "here"), "bad node", 86, "full disk")
    second = begin_attempt(tmp_path, "local", 1, "here")
    rolled = training(second.began, attempt=1, start_step=4, end_step=9, cause="rollback")
    died = training(second.began, attempt=2, start_step=4, end_step=20, cause="died", accused={"3": "killed"})
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [before, rolled, died]}))
    # as if the first job's attempt had been a minute ago
    ledger = tmp_path / "launch" / "attempts.jsonl"
    ledger.write_text(ledger.read_text().replace(str(first.began), str(first.began - 60)))
    lines = [line.strip() for line in show_status(status_of(tmp_path)).splitlines()]
    shown = [line.partition(" on here")[0].partition(": ")[0] for line in lines[3:]]
    assert shown == ["ranks", "attempt 0", "attempt 1", "ranks", "ranks"]
    assert lines[3] == "ranks: from step 0 to 4: stopped by SIGINT"
    assert lines[4].endswith("from checkpoint 0 to 0: bad node (full disk)")
    assert lines[5].endswith("from checkpoint 0: at work")
    assert lines[6:] == [
        "ranks: from step 4 to 9: rollback",
        "ranks: from step 4 to 20: died, accused: rank 3",
    ]
