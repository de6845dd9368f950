"""A forecast follows from operations, bytes and processor time, and says what a run will wait for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.synth import SynthOptions, synthesize
from framework.data.sources import open_sources
from framework.errors import RecipeError
from framework.forecast import decode as decode_module
from framework.forecast.command import forecast_command
from framework.forecast.data import summarize_plan
from framework.forecast.decode import local_decode_costs
from framework.forecast.forecast import DECODE_MS, Surroundings, forecast, parse_decode_ms
from framework.forecast.hardware import ASSUMED_SHARE, HARDWARE, find_hardware
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe

RESULTS = {
    "device": {"name": "NVIDIA H200", "memory": 150_000_000_000},
    "ceiling": {"flops_per_s": 700e12},
    "steps": [
        {"kind": "step", "width": 768, "depth": 12, "tokens": 539, "share": 0.5},
        {"kind": "step", "width": 768, "depth": 12, "tokens": 1176, "share": 0.6},
        {"kind": "step", "width": 1280, "depth": 32, "tokens": 1176, "share": 0.7},
        {"kind": "forward", "width": 1280, "depth": 32, "tokens": 1176, "share": 0.9},
        {"kind": "step", "width": 1280, "depth": 32, "tokens": 1177, "share": 0.0, "failed": "out of memory"},
    ],
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tubevit_b_k400_in1k").recipe


def predict(recipe: Recipe, around: Surroundings, name: str = "h100") -> dict[str, Any]:
    return forecast(recipe, find_hardware(name), around)


def test_compute_is_three_forward_passes_over_the_rate(recipe: Recipe) -> None:
    found = predict(recipe, Surroundings(1, 8))
    # 126.3 and 21.0 GMAC a sample (docs/published.md has the first), 256 of each on 8 GPUs
    operations = 3 * 2 * (126.3e9 * 32 + 17.9e9 * 32)
    assert found["times"]["compute"] == pytest.approx(operations / (989e12 * ASSUMED_SHARE), rel=0.01)
    assert found["share"]["origin"] == "assumed"
    assert predict(recipe, Surroundings(2, 8))["times"]["compute"] == pytest.approx(
        found["times"]["compute"] / 2
    )


def test_the_bottleneck_follows_the_processor_time(recipe: Recipe) -> None:
    cheap = Surroundings(1, 8, {"k400": 0.1, "in1k": 0.1})
    dear = Surroundings(1, 8, {"k400": 500.0, "in1k": 10.0})
    assert predict(recipe, cheap)["bottleneck"] == "compute"
    slow = predict(recipe, dear)
    assert slow["bottleneck"] == "decode"
    assert slow["step_s"] == pytest.approx((500 + 10) * 32 / 1e3 / recipe.data.workers)
    # with so many cores, decode takes as long as the GPU
    work = slow["times"]["compute"] + slow["times"]["network"]
    assert slow["decode"]["cores_per_gpu"] * work == pytest.approx((500 + 10) * 32 / 1e3)
    assert slow["gpu_hours"] == pytest.approx(8 * recipe.train.steps * slow["step_s"] / 3600)


def test_frozen_layers_have_no_backward_pass() -> None:
    frozen, full = (
        predict(
            load_recipe("tubevit_h_scaleup_k400", (f"model.scale_up.frozen_layers={n}",)).recipe,
            Surroundings(),
        )
        for n in (24, 0)
    )
    assert frozen["times"]["compute"] / full["times"]["compute"] == pytest.approx(0.5, abs=0.01)


def test_a_results_file_replaces_what_was_assumed(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    found = predict(recipe, Surroundings(), str(path))
    assert found["share"]["value"] == 0.6
    assert "1176 tokens" in found["share"]["origin"]
    assert found["hardware"]["name"] == "NVIDIA H200"
    assert found["memory"]["capacity"] == 150_000_000_000
    large = load_recipe("tubevit_h_k400_in1k").recipe
    assert predict(large, Surroundings(), str(path))["share"]["value"] == 0.7


@pytest.mark.parametrize("content", ["{}", "no json", '{"device": 3, "ceiling": {}, "steps": []}'])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match="no results file"):
        find_hardware(str(path))


def test_an_unknown_gpu_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean `h200`"):
        find_hardware("h20")
    assert find_hardware("H100") is HARDWARE["h100"]


def test_ranks_that_do_not_divide_are_an_error(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="not divisible"):
        predict(recipe, Surroundings(3, 7))


@pytest.mark.parametrize("text", ["k400", "k400=x", "k40=3", "k400=-1", "k400=nan"])
def test_decode_times_are_checked(recipe: Recipe, text: str) -> None:
    with pytest.raises(RecipeError, match="--decode-ms"):
        parse_decode_ms([text], recipe)


def test_the_command_writes_json_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: dict[str, Any] = {"nodes": 2, "gpus_per_node": 8, "decode_ms": ["k400=16"]}
    forecast_command("tubevit_b_k400_in1k", [], "h200", **arguments, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"] == 16
    assert found["decode"]["ms"]["k400"] == 16
    forecast_command("tubevit_b_k400_in1k", [], "h200", **arguments, as_json=False)
    table = capsys.readouterr().out
    for word in ("bottleneck", "GPU-hours", "assumed", "largest"):
        assert word in table


def test_decode_is_measured_where_the_shards_are_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"train_videos": 4, "val_videos": 8, "train_images": 4, "val_images": 10}
    synthesize(SynthOptions(tmp_path / "shards", size=16, frames=6, **counts))
    here = [f"data.sources.digits.path={tmp_path}/shards/train", "data.sources.motion.path=/nowhere"]
    forecast_command("demo", here, "h100", nodes=1, gpus_per_node=1, decode_ms=[], as_json=True)
    decode = json.loads(capsys.readouterr().out)["decode"]
    assert decode["origin"] == {"motion": "estimated", "digits": "measured here"}
    assert 0 < decode["ms"]["digits"] != DECODE_MS["image"]

    forecast_command("demo", here, "h100", nodes=1, gpus_per_node=1, decode_ms=["digits=7"], as_json=False)
    said = capsys.readouterr().out
    assert "digits 7 as said" in said
    assert "estimated" in said

    here[1] = f"data.sources.motion.path={tmp_path}/shards/train"
    recipe = load_recipe("demo", here).recipe
    summary = summarize_plan(recipe, find_hardware("h100"), nodes=1, gpus_per_node=1, measured=3)
    assert summary["decode_measured"] == sorted(local_decode_costs(recipe)) == ["digits", "motion"]


def test_shards_that_cannot_be_read_are_left_to_the_estimate(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are there when the source is opened, and gone when samples are read."""
    counts = {"train_videos": 4, "val_videos": 8, "train_images": 4, "val_images": 10}
    synthesize(SynthOptions(tmp_path / "shards", size=16, frames=6, **counts))

    def open_and_lose(recipe: Recipe) -> Any:
        opened = open_sources(recipe)
        for shard in (tmp_path / "shards" / "train").glob("*.tar"):
            shard.rename(shard.with_suffix(".gone"))
        lost.append(sorted(opened))
        return opened

    lost: list[list[str]] = []
    monkeypatch.setattr(decode_module, "open_sources", open_and_lose)
    here = [f"data.sources.{name}.path={tmp_path}/shards/train" for name in ("digits", "motion")]
    forecast_command("demo", here, "h100", nodes=1, gpus_per_node=1, decode_ms=[], as_json=True)
    decode = json.loads(capsys.readouterr().out)["decode"]
    assert decode["origin"] == {"motion": "estimated", "digits": "estimated"}
    assert lost, "a source was opened, so that reading is what fails"
    assert "costs to decode is estimated" in caplog.text


def test_samples_a_second_are_samples_and_not_their_views() -> None:
    once = load_recipe("tubevit_b_k400_in1k", ("data.mixture={k400: 256, in1k: 256}",)).recipe
    often = load_recipe(
        "tubevit_b_k400_in1k", ("data.mixture={k400: 256, in1k: 256}", "data.sources.k400.repeats=4")
    ).recipe
    for recipe, samples in ((once, 256), (often, 64)):
        found = predict(recipe, Surroundings(1, 8))
        assert found["samples_per_s"]["k400"] * found["step_s"] == pytest.approx(samples)
