"""`launch plan` without a Slurm: what it refuses, what it opens, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.data import sources
from framework.errors import DataError
from launch import plan, slurm
from launch.pace import Pace
from launch.plan import Plan, plan_run
from launch.plan_page import show_plan
from launch.submission import Submission
from launch.wishes import Wishes

PACE = Pace(2.0, "measured", 1.0, "measured", 0.5, 60.0, "measured", 10**6, "measured")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of 16 pictures, four of them a step."""
    from data_tools.synth import SynthOptions, synthesize

    counts = {"train_videos": 2, "val_videos": 2, "train_images": 16, "val_images": 10}
    synthesize(SynthOptions(tmp_path / "set", frames=4, **counts))  # type: ignore[arg-type]
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: job\nmodel: {name: vit_ti}\n"
        f"data: {{sources: {{digits: {{path: {tmp_path}/set/train, kind: image, classes: 10, size: 32}}}}, "
        "mixture: {digits: 4}}\noptimizer: {lr: 1e-3}\ntrain: {steps: 10}\n"
    )
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster that would start the job at once, a known pace, and the splits that are opened."""
    splits: list[str] = []
    really_open = sources.open_sources

    def open_sources(recipe: object, split: str = "train") -> object:
        splits.append(split)
        return really_open(recipe, split)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "open_sources", open_sources)
    monkeypatch.setattr(plan, "partitions", list)
    monkeypatch.setattr(plan, "choose_partition", lambda *_: None)
    monkeypatch.setattr(plan, "batch_script", lambda _: "#!/bin/bash")
    monkeypatch.setattr(plan, "pace_of", lambda *_: PACE)
    return splits


def test_shards_that_do_not_fit_the_recipe_are_no_plan(
    recipe: Path, tmp_path: Path, opened: list[str]
) -> None:
    wrong = ["data.sources.digits.classes=9"]
    with pytest.raises(DataError, match="has 10 classes, the recipe says 9"):
        plan_run(str(recipe), wrong, Wishes(ranks_per_node=1), None, tmp_path / "run")


def test_epochs_are_those_of_the_shards_that_were_opened_once(
    recipe: Path, tmp_path: Path, opened: list[str]
) -> None:
    found = plan_run(str(recipe), (), Wishes(ranks_per_node=1, time="60"), None, tmp_path / "run")
    assert found.reachable == 10
    assert found.epochs == {"digits": 2.5}
    assert opened == ["train", "validation"]


@pytest.mark.parametrize(("jobs", "said"), [(1, "1 time limit\n"), (3, "3 time limits\n")])
def test_how_many_time_limits_a_run_takes(jobs: int, said: str) -> None:
    estimate = slurm.Estimate("at once", None, "")
    figures = {"steps": 10, "from_step": 0, "reachable": 10, "epochs": {"digits": 2.5}, "jobs": jobs}
    figures |= {"hours": 2.0, "gpu_hours": 4.0, "free_bytes": None, "kept_checkpoints": 1}
    ends = {"problems": (), "warnings": (), "exit_code": 0}
    found = Plan(Submission("/runs/job", "job"), "#!/bin/bash", estimate, PACE, **figures, **ends)  # type: ignore[arg-type]
    assert f"2 h, 4 rank-hours, {said}" in show_plan(found)
