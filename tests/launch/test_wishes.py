"""No option of `tubeworks launch` is taken and then left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from framework.errors import RecipeError
from framework.recipe import load_recipe
from launch.cli import app
from launch.site import Site
from launch.submit import plan_submission
from launch.sweep import elements_of
from launch.wishes import Wishes


def refusal(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["launch", *arguments])
    assert done.exit_code == 2, done.output
    return " ".join(re.sub("[^ -~]", " ", done.output).split())


def test_what_only_slurm_can_grant_is_refused_for_this_machine(tmp_path: Path) -> None:
    run = ("demo", "--local", "--run", str(tmp_path / "run"))
    assert "--partition, --time: asked of Slurm" in refusal(
        "submit", *run, "--time", "10", "--partition", "a"
    )
    assert "--nodes: asked of Slurm" in refusal("submit", *run, "--nodes", "2")
    assert not (tmp_path / "run").exists()


def test_the_nodes_of_a_site_are_not_this_machine() -> None:
    recipe, site = load_recipe("demo").recipe, Site(nodes=4, ranks_per_node=2)
    here = plan_submission(recipe, Wishes(), site, Path("/runs/a"), local=True)
    assert (here.nodes, here.ranks) == (1, 2)
    assert plan_submission(recipe, Wishes(), site, Path("/runs/a")).ranks == 8


@pytest.mark.parametrize("option", ["--nodes", "--gpus-per-node", "--ranks-per-node", "--container"])
def test_sharding_knows_no_options_of_trainings(option: str, tmp_path: Path) -> None:
    assert "No such option" in refusal("shard", str(tmp_path / "out"), option, "2")


def test_the_example_of_a_sweep_is_one() -> None:
    with pytest.raises(RecipeError) as caught:
        elements_of(["optimizer.lr"])
    (example,) = re.findall('such as "([^"]*)"', str(caught.value))
    key, _, values = example.partition("=")
    for value in values.split(","):
        assert load_recipe("demo", [f"{key}={value}"]).recipe.optimizer.lr == float(value)
