"""A job that hangs is ended in time, and the post-mortem names the rank, its phase and its samples."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rank_processes import Job, start_training, train_to_end, wait_for_checkpoint, wait_for_step

from framework.watch.attempts import attempts_of

SECONDS = 6  # the first step may take three times as long, and the machine may be busy
LONG = ("train.steps=4000", "checkpoint.every=4000", f"guards.hang_seconds={SECONDS}")


def report(run: Path, attempt: int = 0) -> dict[str, Any]:
    """The post-mortem of an attempt, when it has been written."""
    path = run / "postmortem" / f"attempt-{attempt}.json"
    deadline = time.monotonic() + 15
    while not path.with_suffix(".md").exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)
    return json.loads(path.read_text())


def stop_rank(job: Job, run: Path, rank: int) -> list[int | None]:
    wait_for_step(job, run, 5)
    job.send(signal.SIGSTOP, ranks=[rank])
    return job.wait(SECONDS + 10)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_the_job_ends(recipe_file: Path, tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *LONG)
    codes = stop_rank(job, run, rank)
    assert codes == ([-9, 7] if rank == 0 else [7, -9]), [job.said(one)[-2000:] for one in (0, 1)]

    found = report(run)
    assert found["what"] == "hang"
    assert list(found["accused"]) == [str(rank)]
    assert "T (stopped)" in found["accused"][str(rank)]
    waiting = found["ranks"][1 - rank]
    assert "torch/distributed" in waiting["stacks"]
    assert waiting["state"] == "hung"
    text = (run / "postmortem" / "attempt-0.md").read_text()
    assert f"**rank {rank}** on" in text
    assert "phase " in text
    last = attempts_of(run)[-1]
    assert last["cause"] == "hang"
    assert last["end_step"] >= 4
    assert last["checkpoint"] is None


def test_an_evaluated_run_that_ends_well_leaves_no_postmortem(trained: Path) -> None:
    assert not (trained / "postmortem").exists()
    (attempt,) = attempts_of(trained)
    assert (attempt["cause"], attempt["end_step"], attempt["checkpoint"]) == ("finished", 6, 6)


def hanging(rank: int, how: str, go: Path) -> str:
    """Code that lets the data of a rank hang as soon as there is a file `go`."""
    return f"""
import ctypes, os, time
from pathlib import Path
from framework.data import samples
reading = samples.SampleReader.training_views
def hanging(self, info, seeds, out=None):
    if os.environ["RANK"] == "{rank}" and Path({str(go)!r}).exists():
        {how}
    return reading(self, info, seeds, out)
samples.SampleReader.training_views = hanging
"""


def train_with(code: str, *arguments: str) -> None:
    """`tubeworks train` in a rank whose data is disturbed by `code`."""
    from rank_processes import command_line

    exec(code, {})
    command_line(*arguments)


@pytest.mark.parametrize("last", [0, 1])
def test_all_ranks_of_a_job_that_hangs_say_so(recipe_file: Path, tmp_path: Path, last: int) -> None:
    """Whoever leaves last has lost contact to the others by then, which is not what has happened."""
    run, go = tmp_path / "run", tmp_path / "go"
    late = f'import os\nfrom framework.watch import heart\nif os.environ["RANK"] == "{last}":\n'
    late += "    heart.PULSE_SECONDS = 600\n"
    code = late + hanging(1 - last, "time.sleep(600)", go)
    arguments = ["train", str(recipe_file), *LONG, "data.workers=1", "--run", str(run)]
    job = Job(2, tmp_path / "logs", train_with, code, *arguments)
    wait_for_step(job, run, 3)
    go.touch()
    assert job.wait(SECONDS + 10) == [7, 7], [job.said(one)[-2000:] for one in (0, 1)]
    assert report(run)["what"] == "hang"


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        ("time.sleep(600)", 1),
        # an extension that keeps the interpreter's lock: no thread of this rank runs any more
        ("ctypes.PyDLL(None).sleep(600)", 0),
    ],
)
def test_a_sample_that_never_comes_is_named(
    recipe_file: Path, tmp_path: Path, how: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go = tmp_path / "run", tmp_path / "go"
    arguments = ["train", str(recipe_file), *LONG, f"data.workers={workers}", "--run", str(run)]
    job = Job(2, tmp_path / "logs", train_with, hanging(1, how, go), *arguments)
    wait_for_step(job, run, 3)
    go.touch()
    codes = job.wait(SECONDS + 10)
    assert codes == ([7, 7] if workers else [7, -9]), [job.said(one)[-2000:] for one in (0, 1)]

    found = report(run)
    assert list(found["accused"]) == ["1"]
    record = found["ranks"][1]
    assert record["phase"] == "data"
    assert "hanging" in record["stacks"], record["stacks"]
    named = found["samples"]["1"]
    assert any(line.startswith("motion ") and " in shard-" in line and " at " in line for line in named)
    assert "## Rank 1: stacks" in (run / "postmortem" / "attempt-0.md").read_text()


def test_a_killed_rank_is_named_and_the_run_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("train.steps=40", "checkpoint.every=4")
    job = start_training(recipe_file, run, 2, *settings)
    wait_for_checkpoint(job, run, 4)
    job.send(signal.SIGKILL, ranks=[1])
    assert job.wait(30) == [6, -9]
    found = report(run)
    assert found["what"] == "died"
    assert list(found["accused"]) == ["1"]
    first = attempts_of(run)[0]
    assert first["cause"] == "died"
    assert first["checkpoint"] >= 4

    train_to_end(recipe_file, run, 2, *settings)
    assert [attempt["cause"] for attempt in attempts_of(run)] == ["died", "finished"]


def test_all_ranks_killed_at_once(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *LONG)
    wait_for_step(job, run, 3)
    job.kill()
    found = report(run)
    assert found["what"] == "died"
    assert list(found["accused"]) == ["0", "1"]
