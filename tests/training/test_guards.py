"""Runs that have collapsed, and weights that nothing reaches, end with a message that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import Job, command_line, journalled, start_training, train_to_end
from torch import nn

from framework.errors import TrainingStopped
from framework.recipe import tube_sets
from framework.recipe.schema import Recipe
from framework.training.distributed import Peers
from framework.training.guards import CollapseGuard, DeadGuard
from framework.world import World

Make = Callable[..., Recipe]
ALONE = Peers(World(), None)


def point(loss: float = math.log(8), top_1: float = 1 / 8) -> dict[str, float]:
    """A logging point where digits learn, and motion as is said."""
    return {
        "train/motion/loss": loss,
        "train/motion/top_1": top_1,
        "train/digits/loss": 1.0,
        "train/digits/top_1": 0.7,
        "train/lr": 5e-5,
    }


@pytest.fixture
def guard(make_recipe: Make) -> CollapseGuard:
    """Looks at five points; the warm-up has two steps, and a point has 8 samples of motion."""
    return CollapseGuard(make_recipe("guards.collapse=5"))


def test_collapse_is_told_with_source_rate_and_paper(guard: CollapseGuard) -> None:
    for step in range(1, 7):  # two of them in the warm-up
        guard.look(step, point())
    with pytest.raises(TrainingStopped) as caught:
        guard.look(7, point(top_1=0.0))
    text = str(caught.value)
    for words in ("source motion", "5 logging points up to step 7", "ln(8 classes)", "5e-05", "appendix A"):
        assert words in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "alive",
    [
        point(loss=2.0),
        point(loss=math.log(8) * 1.02),
        point(top_1=1.0),
        point(loss=math.log(8) * 0.985),
    ],
)
def test_one_point_that_is_not_flat_is_enough(guard: CollapseGuard, alive: dict[str, float]) -> None:
    for step in range(3, 103):
        guard.look(step, alive if step % 5 == 0 else point())
    assert len(guard.state()["seen"]["motion"]) == 5, "it has looked at all of them"
    for step in range(103, 105):
        guard.look(step, point())
    with pytest.raises(TrainingStopped):  # without that one point
        guard.look(105, point())


def test_a_collapse_in_the_middle_is_found(guard: CollapseGuard) -> None:
    for step in range(3, 50):
        guard.look(step, point(loss=1.5, top_1=0.6))
    for step in range(50, 54):
        guard.look(step, point())
    with pytest.raises(TrainingStopped, match="source motion"):
        guard.look(54, point())


def test_off_is_off(make_recipe: Make) -> None:
    guard = CollapseGuard(make_recipe("guards.collapse=0"))
    for step in range(3, 200):
        guard.look(step, point())
    assert guard.state() == {"seen": {}}, "no source is looked at"


def test_what_is_not_learned_need_not_learn(make_recipe: Make) -> None:
    guard = CollapseGuard(make_recipe("guards.collapse=5", "data.sources.motion.loss_weight=0"))
    for step in range(3, 200):
        guard.look(step, point())
    assert list(guard.state()["seen"]) == ["digits"], "the source that is learned from is looked at"


class Net(nn.Module):
    """Parameters that get gradients, none, zeros, or now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.ones(3))
        self.unused = nn.Parameter(torch.ones(3))
        self.zeros = nn.Parameter(torch.ones(3))
        self.sometimes = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, step: int) -> torch.Tensor:
        total = self.used + 0 * self.zeros + self.frozen
        return (total * self.sometimes if step == 2 else total).sum()


def test_dead_parameters_are_named(make_recipe: Make) -> None:
    net = Net()
    guard = DeadGuard(net, make_recipe("guards.dead=4"))
    for step in range(4):
        guard.look(step, ALONE)
        net(step).backward()
        guard.step_done()
    with pytest.raises(TrainingStopped) as caught:
        guard.look(4, ALONE)
    assert "without any gradient in 4 steps up to step 4: unused, zeros." in str(caught.value)


def test_after_the_look_nothing_is_watched(make_recipe: Make) -> None:
    net = nn.Linear(3, 3)
    guard = DeadGuard(net, make_recipe("guards.dead=2"))
    for step in range(6):
        net(torch.ones(3)).sum().backward()
        guard.step_done()
        guard.look(step + 1, ALONE)
    assert not net.weight._backward_hooks


def train_unchecked(*arguments: str) -> None:
    """`tubeworks train` without the look at its tubes: stands for what cannot be known before it happens."""
    tube_sets.check_tubes_are_read = lambda recipe: None
    command_line("train", *arguments)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_training_with_dead_tubes_ends(recipe_file: Path, tmp_path: Path, zero: int) -> None:
    settings = ("guards.dead=2", "data.mixture={digits: 8}", f"engine.zero={zero}")
    job = Job(2, tmp_path, train_unchecked, str(recipe_file), *settings, "--run", str(tmp_path / "run"))
    assert job.wait() == [5, 5], job.said()[-3000:]
    last = job.said().splitlines()[-1]
    assert "2 steps up to step 2: tokenizer.tubes.0.weight, tokenizer.tubes.0.bias. Nothing" in last
    report = (tmp_path / "run" / "postmortem" / "attempt-0.md").read_text()
    assert "Going on unchanged ends the same way: change what the message advises" in report
    assert "Going on: `tubeworks train" not in report


def test_tubes_that_nothing_reads_are_refused_before_the_start(recipe_file: Path, tmp_path: Path) -> None:
    job = start_training(recipe_file, tmp_path / "run", 2, "data.mixture={digits: 8}")
    assert job.wait() == [2, 2], job.said()[-3000:]
    assert "tube 1 of 2 (`model.tubes[0]`: kernel 2x8x8" in job.said()
    assert "tube 2 of 2" not in job.said(), "images read that one"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [("engine.zero=3",), ("train.activation_checkpointing=true",)])
def test_a_sound_training_passes(recipe_file: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    run = train_to_end(recipe_file, tmp_path / "run", 1, "guards.dead=2", "train.steps=4", *settings)
    assert list(journalled(run)) == [1, 2, 3, 4], "it went on after the look at step 2"
    assert not (run / "postmortem").exists()
