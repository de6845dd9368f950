"""Who may go on with a run: the same experiment, with the same shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_processes import CPU, start_training

from data_tools.synth import SynthOptions, synthesize
from framework.data.plan import Plan
from framework.data.sources import build_plan, open_sources
from framework.errors import RecipeError, TubeworksError
from framework.recipe.schema import Recipe
from framework.training.run_folder import check_continuation, differences, open_run, read_run
from framework.training.run_place import OWN_NAMES, check_place
from framework.world import World


def plan_of(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["plan"]


def plan_for(recipe: Recipe) -> Plan:
    return build_plan(recipe, open_sources(recipe))


def test_the_same_recipe_goes_on(trained: Path, make_recipe: Callable[..., Recipe]) -> None:
    check_continuation(trained, make_recipe(), plan_for(make_recipe()))


def test_an_empty_folder_takes_any(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    check_continuation(tmp_path, make_recipe(), plan_for(make_recipe()))


@pytest.mark.parametrize(
    "override",
    [
        "data.workers=3",
        "data.on_corrupt=substitute",
        "data.sources.motion.validation=elsewhere",
        "train.accumulation=2",
        "train.log_every=7",
        "engine.zero=3",
        "checkpoint.every=1",
        "tracking.mlflow=true",
        "evaluation.batch=3",
        "description=better",
    ],
)
def test_what_shapes_no_loss_may_change(
    trained: Path, make_recipe: Callable[..., Recipe], override: str
) -> None:
    check_continuation(trained, make_recipe(override), plan_for(make_recipe()))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=4", "seed: 3 -> 4"),
        ("train.steps=7", "train.steps: 6 -> 7"),
        ("optimizer.lr=0.5", "optimizer.lr: 0.001 -> 0.5"),
        ("data.mixture.motion=4", "data.mixture.motion: 8 -> 4"),
        ("engine.precision=bf16", "engine.precision: fp32 -> bf16"),
        ("train.ema_decay=null", "train.ema_decay: 0.9 -> None"),
        ("model.depth=3", "model.depth: 2 -> 3"),
        ("data.sources.motion.label_smoothing=0.2", "data.sources.motion.label_smoothing: 0.1 -> 0.2"),
    ],
)
def test_what_shapes_the_experiment_may_not(
    trained: Path, make_recipe: Callable[..., Recipe], override: str, line: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_continuation(trained, make_recipe(override), plan_for(make_recipe()))
    assert f"\n  {line}\n" in str(caught.value)
    assert "--run NEW_FOLDER" in str(caught.value)


def test_all_differences_are_listed(make_recipe: Callable[..., Recipe]) -> None:
    changed = make_recipe("seed=4", "optimizer.lr=0.5", "train.ema_decay=null")
    keys = [key for key, _ in differences(make_recipe(), changed)]
    assert keys == ["optimizer.lr", "seed", "train.ema_decay"]


def test_a_changed_recipe_is_refused_on_the_command_line(recipe_file: Path, run_copy: Path) -> None:
    job = start_training(recipe_file, run_copy, 2, "seed=4", "optimizer.lr=0.5", "data.workers=1")
    assert job.wait() == [2, 2]
    said = job.said()
    assert f"error: {run_copy} holds a run of another experiment:\n" in said
    assert "  optimizer.lr: 0.001 -> 0.5\n  seed: 3 -> 4\n" in said
    assert "Traceback" not in said


def test_other_shards_are_refused(recipe_file: Path, run_copy: Path, tmp_path: Path) -> None:
    counts: dict[str, Any] = {"train_videos": 24, "val_videos": 8, "train_images": 24, "val_images": 10}
    synthesize(SynthOptions(tmp_path / "shards", size=16, frames=6, seed=1, **counts))
    others = [f"data.sources.{name}.path={tmp_path}/shards/train" for name in ("motion", "digits")]
    job = start_training(recipe_file, run_copy, 1, *others)
    assert job.wait() == [2]
    assert f"error: {run_copy} was trained with plan {plan_of(run_copy)}" in job.said()
    assert "Take the shards that it started with" in job.said()
    assert "digits: identity " in job.said(), "which source is another one"


def test_shards_that_only_moved_are_welcome(
    recipe_file: Path, run_copy: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(shards)
    moved = [f"data.sources.{name}.path={tmp_path}/moved/train" for name in ("motion", "digits")]
    assert start_training(recipe_file, run_copy, 1, *moved).wait() == [0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_run_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(TubeworksError, match=r"cannot read .*run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"version": "x"}', '{"version": 1}', '{"version": 1, "plan": "", "attempts": [3]}']
)
def test_a_run_json_of_other_content_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(TubeworksError, match=r"run\.json.*Restore it, or use a new --run folder"):
        read_run(tmp_path)


def test_a_run_without_its_recipe_does_not_take_another(
    trained: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "recipe.yaml").unlink()
    for gone in (None, "run.json"):
        if gone:
            (run / gone).unlink()
        with pytest.raises(TubeworksError, match=r"a run without its recipe\.yaml"):
            check_continuation(run, make_recipe(), plan_for(make_recipe()))


@pytest.mark.parametrize(
    "names", [(), ("logs", "launch", "code"), (".hidden", "nohup.out", "slurm-7.log"), ("lost+found",)]
)
def test_a_folder_that_a_launcher_has_made_is_welcome(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    check_place(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_all_that_a_run_leaves_is_known(trained: Path) -> None:
    assert {path.name for path in trained.iterdir() if path.name[0] != "."} <= OWN_NAMES
    (trained / "notes.txt").touch()  # a run may have guests
    check_place(trained)
    (trained / "notes.txt").unlink()
    assert read_run(trained) is not None


def test_all_names_of_a_run_are_in_the_operators_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operators.md").read_text(encoding="utf-8")
    section = text.partition("\n## The run folder\n")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name.partition("/")[0] for cell in first for name in re.findall("`([^`]+)`", cell)}
    assert named >= OWN_NAMES


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(
    recipe_file: Path, tmp_path: Path, ranks: str
) -> None:
    for name in ("a.txt", "b.txt", "c", "d", "logs"):
        (tmp_path / name).touch()
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe_file), "--run", str(tmp_path)]
    done = subprocess.run(
        [*command, "--ranks", ranks], env={**os.environ, **CPU}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"error: {tmp_path} is no run, and holds a.txt, b.txt, c and 1 more: choose" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "c", "d", "logs"]


def test_a_later_run_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"version": 2}')
    with pytest.raises(TubeworksError, match="version 2, this tubeworks knows up to 1: upgrade"):
        read_run(tmp_path)


def changed_places(recipe: Recipe, place: Path | str, held_out: Path | str, uri: str) -> Recipe:
    values = recipe.model_dump()
    for source in values["data"]["sources"].values():
        source |= {"path": str(place), "validation": str(held_out)}
    return Recipe.model_validate(values | {"tracking": values["tracking"] | {"uri": uri}})


def begin(run: Path, recipe: Recipe, plan: Plan, folder: Path) -> list[str]:
    """Let an attempt begin in a working folder; what it says has changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        open_run(run, recipe, World(), plan, 3, recipe.train.accumulation, [])
    state = read_run(run)
    assert state is not None
    return [line.replace("data.sources.", "") for line in state["attempts"][-1]["changed"]]


def test_a_path_made_absolute_is_no_change(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    """`train` keeps paths as they were written, `launch submit` makes them absolute, and starts elsewhere."""
    tiny, run = make_recipe(), tmp_path / "run"
    plan, here, there = plan_for(tiny), tmp_path / "here", tmp_path / "there"
    for folder in (run, here, there):
        folder.mkdir()
    written = changed_places(tiny, "shards/train", "shards/val", "sqlite:///m.db")
    absolute = changed_places(tiny, here / "shards/train", here / "shards/val", f"sqlite:///{here}/m.db")
    for recipe, folder in ((written, here), (absolute, there), (written, here)):
        assert begin(run, recipe, plan, folder) == []
    assert not (run / "events.jsonl").exists()
    elsewhere = begin(run, written, plan, there)
    assert f"motion.path: {here}/shards/train -> {there}/shards/train" in elsewhere


def test_another_place_that_ends_alike_is_a_change(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    tiny, run, there = make_recipe(), tmp_path / "run", tmp_path / "there"
    plan = plan_for(tiny)
    for folder in (run, there):
        folder.mkdir()
    begin(run, changed_places(tiny, "shards/train", "shards/val", "sqlite:///m.db"), plan, tmp_path)
    moved = changed_places(tiny, there / "shards/train", there / "shards/val", f"sqlite:///{there}/m.db")
    moved = moved.model_copy(update={"tracking": moved.tracking.model_copy(update={"experiment": "/a/tiny"})})
    assert {line.partition(":")[0] for line in begin(run, moved, plan, tmp_path)} == {
        *(f"{source}.{key}" for source in ("digits", "motion") for key in ("path", "validation")),
        "tracking.experiment",
        "tracking.uri",
    }


def test_other_held_out_samples_are_an_event(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    """The curve of a metric is of different samples before and after."""
    tiny = make_recipe()
    plan = plan_for(tiny)
    begin(tmp_path, changed_places(tiny, "shards/train", "shards/val", "file:///m"), plan, tmp_path)
    other = changed_places(tiny, "shards/train", "/mnt/other/shards/val", "file:///m")
    assert len(begin(tmp_path, other, plan, tmp_path)) == 2
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["step"], event["change"]) for event in events] == [
        (
            "held_out_changed",
            3,
            f"data.sources.{name}.validation: {tmp_path}/shards/val -> /mnt/other/shards/val",
        )
        for name in ("digits", "motion")
    ]


def test_without_a_record_of_the_folder_a_difference_is_a_change(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    tiny = make_recipe()
    plan = plan_for(tiny)
    written = changed_places(tiny, "shards/train", "shards/val", "file:///m")
    absolute = changed_places(tiny, tmp_path / "shards/train", "shards/val", "file:///m")
    for recipe, changes in ((written, 0), (absolute, 2)):
        begin(tmp_path, written, plan, tmp_path)
        state = json.loads((tmp_path / "run.json").read_text())
        del state["attempts"][-1]["folder"]
        (tmp_path / "run.json").write_text(json.dumps(state))
        assert len(begin(tmp_path, recipe, plan, tmp_path)) == changes
