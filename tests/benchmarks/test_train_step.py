"""The GPU benchmark runs all of its parts on a CPU, without the libraries of data and tracking."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.step.joint import padded_logits
from benchmarks.step.product import Case, Setting, operations
from benchmarks.step.sections import Rows
from benchmarks.step.tokenizers import WAYS
from benchmarks.train_step import SECTIONS, collect, goals
from framework.forecast.hardware import find_hardware
from framework.models.registry import build_model, inputs_of

WITHOUT = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"av", "mlflow", "pyarrow", "webdataset", "PIL", "typer", "submitit"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
runpy.run_module("benchmarks.train_step", run_name="__main__")
"""
SETTING = Setting(torch.device("cpu"), tiny=True)


@pytest.fixture(scope="module")
def results_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "results.json"
    command = [sys.executable, "-c", WITHOUT, "--tiny", "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "share of the matrix rate" in done.stdout
    return path


@pytest.fixture(scope="module")
def results(results_file: Path) -> dict[str, Any]:
    return json.loads(results_file.read_text())


def test_every_part_has_figures(results: dict[str, Any]) -> None:
    assert results["skipped"] == []
    assert results["broken"] == {}
    assert results["complete"]
    assert results["ceiling"]["flops_per_s"] > 0
    chosen = [row for row in results["attention"] if row["kernel"].startswith("as PyTorch")]
    assert {row["head_width"] for row in chosen if row["median_s"] > 0} == {64, 80}
    for section in ("steps", "tokenizers", "joint", "frozen"):
        assert results[section], section
        for row in results[section]:
            assert "failed" not in row, row
            assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
    assert {row["kind"] for row in results["steps"]} == {"forward", "step"}
    assert all(row["found"] >= row["predicted"] for row in results["largest"])
    plain = next(row for row in results["rivals"] if row["rival"].startswith("torch"))
    assert plain["ours_is_faster_by"] > 0


def test_a_share_is_operations_over_time_and_rate(results: dict[str, Any]) -> None:
    for row in results["steps"]:
        case = Case(row["size"], row["tokens"], row["batch"], row["joint"], False, row["checkpointing"])
        work = operations(SETTING.recipe(case), training=row["kind"] == "step")
        expected = work / row["median_s"] / results["ceiling"]["flops_per_s"]
        assert row["share"] == pytest.approx(expected)


def test_frozen_layers_are_cheaper(results: dict[str, Any]) -> None:
    full, part = results["frozen"]
    assert (part["frozen_layers"], full["frozen_layers"]) == (1, 0)
    assert part["operations_of_full"] == pytest.approx((3 + 1) / 6)


def test_a_forecast_can_be_made_from_it(results_file: Path, results: dict[str, Any]) -> None:
    found = find_hardware(str(results_file))
    assert found.matmul == results["ceiling"]["flops_per_s"]
    assert {row.share for row in found.measured} == {
        row["share"] for row in results["steps"] if row["kind"] == "step"
    }


def test_goals_follow_from_the_figures(results: dict[str, Any]) -> None:
    by_name = {goal.name: goal for goal in goals(results)}
    shares = [row["share"] for row in results["steps"] if row["kind"] == "step" and not row["joint"]]
    found = by_name["B, 539 tokens: share of the matrix rate"]
    assert found.value == max(shares)
    assert found.reached == (max(shares) >= 0.55)
    missing = by_name["H, 539 tokens: share of the matrix rate"]
    assert (missing.value, missing.reached) == (None, None)


@pytest.mark.parametrize("tokens", [539, 735, 1176])
def test_cases_have_the_tokens_that_they_say(tokens: int) -> None:
    from framework.models.describe import describe_recipe

    recipe = SETTING.recipe(Case("b", tokens, 2))
    assert describe_recipe(recipe)["tokens"]["k400"] == tokens


@pytest.mark.parametrize("way", [name for name in WAYS if not name.startswith("strided")])
def test_all_tokenizers_compute_the_same(way: str) -> None:
    recipe = SETTING.recipe(Case("b", 735, 2))
    tokenizer: Any = build_model(recipe.model, inputs_of(recipe)).tokenizer
    clip = torch.randint(256, (2, 3, 32, 224, 224), dtype=torch.uint8)
    expected = tokenizer.tokens([clip])[0]
    found = WAYS[way](tokenizer, clip)()
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_padding_computes_what_the_joint_pass_does() -> None:
    recipe = SETTING.recipe(Case("b", 539, 2, joint=True))
    model: Any = build_model(recipe.model, inputs_of(recipe)).eval()
    pixels = {
        name: torch.randint(256, (3, 3, spec.frames, 224, 224), dtype=torch.uint8)
        for name, spec in inputs_of(recipe).items()
    }
    expected, found = model(pixels), padded_logits(model, pixels)
    for name, logits in expected.items():
        assert float(((found[name] - logits).norm() / logits.norm()).detach()) < 1e-4


def test_a_run_that_is_killed_leaves_what_it_has_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--tiny", "--out", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = next(line for line in running.stdout if line.startswith("steps:") and ", step," in line)
        running.kill()
    assert "share=" in said
    results = json.loads(path.read_text())
    assert (results["complete"], len(results["steps"]) >= 1) == (False, True)
    assert find_hardware(str(path)).matmul == results["ceiling"]["flops_per_s"]


def test_a_section_that_breaks_is_named_and_keeps_its_rows(tmp_path: Path) -> None:
    def part() -> Rows:
        yield {"way": "first", "size": "b", "median_s": 1.0, "low_s": 1.0, "high_s": 1.0}
        raise ValueError("no such kernel")

    results: dict[str, Any] = {name: [] for name in SECTIONS} | {"broken": {}}
    collect(results, "joint", part, tmp_path / "results.json")
    assert [row["way"] for row in json.loads((tmp_path / "results.json").read_text())["joint"]] == ["first"]
    assert results["broken"] == {"joint": "ValueError: no such kernel"}
