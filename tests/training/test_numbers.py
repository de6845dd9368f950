"""Numbers that go wrong: found on any rank, named, and dealt with as the recipe says, alike on all ranks."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Job, command_line, journalled

from framework.data.quarantine import Quarantined, append_quarantine, read_quarantine
from framework.data.sources import build_plan, open_sources
from framework.recipe.schema import Recipe
from framework.training.checkpoint import load_weights, newest_valid
from framework.training.numbers import NumbersGuard
from framework.watch.attempts import attempts_of

Make = Callable[..., Recipe]
BAD_STEP = 7  # counted from 0; the checkpoint before it has 6 steps
SETTINGS = ("train.steps=12", "checkpoint.every=3", "guards.bad_limit=50")

POISON = """
import torch
from framework.data.samples import SampleReader
from framework.models.tubevit import TubeViT

view, forward = SampleReader.training_views, TubeViT.forward

def marked(self, info, seeds, out=None):
    pixels = view(self, info, seeds, out)
    if info.key == {key!r}:
        pixels[:] = 255
    return pixels

def poisoned(self, pixels, *arguments):
    logits = forward(self, pixels, *arguments)
    white = (pixels["motion"] == 255).flatten(1).all(dim=1)
    logits["motion"] = logits["motion"] * torch.where(white, {factor}, 1.0)[:, None]
    return logits

SampleReader.training_views, TubeViT.forward = marked, poisoned
"""


def train_poisoned(code: str, *arguments: str) -> None:
    """`tubeworks train` in a rank whose model answers one white sample of `motion` with NaN or a spike."""
    exec(code, {})
    command_line(*arguments)


def start(recipe: Path, run: Path, key: str, *overrides: str, factor: str = "float('nan')") -> Job:
    code = POISON.format(key=key, factor=factor)
    logs = run.parent / f"logs-{time.monotonic_ns()}"
    arguments = ("train", str(recipe), *SETTINGS, *overrides, "--run", str(run))
    return Job(2, logs, train_poisoned, code, *arguments)


@pytest.fixture(scope="module")
def victim(make_recipe: Make) -> tuple[str, int, list[int]]:
    """Key and index of a sample that rank 1 gets in BAD_STEP, and the steps of a run that feed it."""
    recipe = make_recipe(*SETTINGS)
    sources = open_sources(recipe, "train")
    plan = build_plan(recipe, sources)
    index = int(plan.share(BAD_STEP, rank=1, world=2, micro=0, accumulation=1)["motion"].index[0])
    steps = [step for step in range(12) if index in plan.step(step)["motion"].index]
    opened = sources["motion"]
    return opened.manifest.sample(int(opened.selection[index])).key, index, steps


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["kind"] == kind]


@pytest.mark.parametrize(("policy", "zero"), [("warn", 0), ("warn", 1), ("warn", 3), ("skip", 1)])
def test_an_update_with_nan_is_not_applied_and_its_sample_named(
    recipe_file: Path, tmp_path: Path, victim: tuple[str, int, list[int]], policy: str, zero: int
) -> None:
    key, _, steps = victim
    run = tmp_path / "run"
    job = start(recipe_file, run, key, f"guards.on_bad_numbers={policy}", f"engine.zero={zero}")
    assert job.wait() == [0, 0], job.said()[-3000:]
    skipped = events(run, "skipped")
    assert [event["step"] for event in skipped] == [step + 1 for step in steps]
    assert all(event["samples"] == skipped[0]["samples"] for event in skipped)
    (place,) = skipped[0]["samples"]
    assert place.startswith(f"motion {key} shard-")
    assert "the loss is nan" in skipped[0]["reason"]
    assert journalled(run)[12]["train/skipped_steps"] == len(steps)
    weights = load_weights(newest_valid(run), False)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_too_many_bad_steps_end_the_training(
    recipe_file: Path, tmp_path: Path, victim: tuple[str, int, list[int]]
) -> None:
    run = tmp_path / "run"
    job = start(recipe_file, run, victim[0], "guards.bad_limit=2")
    assert job.wait() == [5, 5], job.said()[-3000:]
    assert "2 of the last 100 steps went wrong" in job.said()
    assert victim[0] in job.said().splitlines()[-1]


@pytest.fixture(scope="module")
def without(
    recipe_file: Path, victim: tuple[str, int, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run that knew from its first bad step on not to feed the sample; nothing goes wrong in it."""
    key, index, steps = victim
    run = tmp_path_factory.mktemp("without") / "run"
    run.mkdir()
    append_quarantine(run, [Quarantined("motion", index, key, "", 0, "known", steps[0])])
    # before that step the sample is fed, and is white in both runs
    job = start(recipe_file, run, key, factor="1.0")
    assert job.wait() == [0, 0], job.said()[-3000:]
    return run


def assert_same_end(run: Path, without: Path) -> None:
    assert journalled(run).keys() == journalled(without).keys()
    assert journalled(run)[12] == journalled(without)[12]
    ours, theirs = (load_weights(newest_valid(folder), True) for folder in (run, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_rollback_goes_on_without_the_sample(
    recipe_file: Path, tmp_path: Path, victim: tuple[str, int, list[int]], without: Path, zero: int
) -> None:
    key, index, steps = victim
    run = tmp_path / "run"
    job = start(recipe_file, run, key, "guards.on_bad_numbers=rollback", f"engine.zero={zero}")
    assert job.wait() == [0, 0], job.said()[-3000:]
    (entry,) = read_quarantine(run).entries
    assert (entry.source, entry.index, entry.key, entry.from_step) == ("motion", index, key, steps[0])
    assert [attempt["cause"] for attempt in attempts_of(run)] == ["rollback", "finished"]
    start_step = attempts_of(run)[1]["start_step"]
    assert start_step == steps[0] // 3 * 3
    assert journalled(run)[12]["train/skipped_steps"] == 0
    if zero == 1:
        assert_same_end(run, without)
    else:
        ours, theirs = (journalled(folder)[12]["train/loss"] for folder in (run, without))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_killed_in_the_middle_of_a_rollback(
    recipe_file: Path, tmp_path: Path, victim: tuple[str, int, list[int]], without: Path
) -> None:
    run = tmp_path / "run"
    job = start(recipe_file, run, victim[0], "guards.on_bad_numbers=rollback")
    deadline = time.monotonic() + 60
    while not (run / "quarantine.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    job.send(signal.SIGKILL)
    assert job.wait(30) == [-9, -9]
    job = start(recipe_file, run, victim[0], "guards.on_bad_numbers=rollback")
    assert job.wait() == [0, 0], job.said()[-3000:]
    assert len({entry.key for entry in read_quarantine(run).entries}) == 1
    assert_same_end(run, without)


@pytest.mark.parametrize(("policy", "applied"), [("warn", True), ("skip", False)])
def test_a_spike_is_found_and_its_update_dropped_where_asked(
    recipe_file: Path, tmp_path: Path, victim: tuple[str, int, list[int]], policy: str, applied: bool
) -> None:
    key, _, _ = victim
    run = tmp_path / "run"
    settings = ("guards.spike=20", "guards.window=8", "train.steps=16", f"guards.on_bad_numbers={policy}")
    job = start(recipe_file, run, key, *settings, factor="3000.0")
    assert job.wait() == [0, 0], job.said()[-3000:]
    found = events(run, "spike" if applied else "skipped")
    assert found
    assert not events(run, "skipped" if applied else "spike")
    assert all(event["step"] > 8 and event["score"] > 20 for event in found), "a window comes first"
    assert any(f"motion {key} " in place for place in found[0]["samples"])
    assert journalled(run)[16]["train/skipped_steps"] == (0 if applied else len(found))


def test_the_score_is_robust_and_the_window_survives_a_checkpoint(make_recipe: Make) -> None:
    recipe = make_recipe("guards.spike=6", "guards.window=32")
    state = {"losses": [2.0 + 0.01 * (step % 5) for step in range(32)] + [90.0], "bad": []}
    guard = NumbersGuard(recipe)
    guard.restore(json.loads(json.dumps([state, state])), 0, 1)
    assert guard.judge([2.05, 2.03]).kind == ""
    verdict = guard.judge([2.0, 3.0])
    assert verdict.kind == "spike"
    losses = guard.state()["losses"]
    assert len(losses) == 32
    # median 2.02, median absolute deviation 0.01
    assert verdict.score == pytest.approx((2.5 - 2.02) / (1.4826 * 0.01), rel=1e-6)
    assert guard.judge([1.0]).kind == "", "a loss that falls is no spike"
    assert guard.judge([2.0, math.inf]) == NumbersGuard(recipe).judge([2.0, math.inf])
    assert guard.judge([2.0, math.inf]).ranks == (1,)
    few = NumbersGuard(recipe)
    few.restore([{"losses": [2.0] * 7, "bad": []}], 0, 1)
    assert few.judge([50.0]).kind == "", "too few losses to say what is usual"
