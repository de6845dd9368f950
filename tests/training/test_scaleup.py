"""The scale-up stage as three trainings: small and joint, large and of images, and the one made from both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_processes import journalled, train_to_end
from safetensors.torch import load_file

from framework.errors import RecipeError
from framework.models.registry import build_model, inputs_of
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe
from framework.training.checkpoint import load_weights, newest_valid, read_manifest
from framework.training.checkpoint_manifest import folder_of
from framework.training.initial import find_origins, load_initial

Make = Callable[..., Recipe]

# 3.5 times the small one's width, so the fourth sub-token is cut; and ZeRO-3 partitions nothing that has less
# than 100,000 elements, such as smaller blocks.
LARGE = ("model.width=224", "model.mlp_width=448")
IMAGES = (
    *LARGE,
    "model.tubes=[{kernel: [1, 8, 8], stride: [4, 8, 8]}]",
    "data.mixture={digits: 8}",
    "train.steps=3",
)
FROZEN = ("tokenizer.", "blocks.0.")


def scaled(tubes: Path, encoder: Path) -> tuple[str, ...]:
    """What makes the tiny recipe a scale-up."""
    return (
        *LARGE,
        "model.scale_up={tube_width: 64, frozen_layers: 1}",
        f"init={{tubes: {tubes}, encoder: {encoder}}}",
        "data.mixture={motion: 8}",
        "optimizer.lr=1e-2",
    )


@pytest.fixture(scope="module")
def encoder(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the large model on images alone."""
    return train_to_end(recipe_file, tmp_path_factory.mktemp("encoder") / "run", 1, *IMAGES)


@pytest.fixture(scope="module")
def run(recipe_file: Path, trained: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the scale-up on one rank: 6 steps, checkpoints after 3 and 6."""
    return train_to_end(recipe_file, tmp_path_factory.mktemp("scaled") / "run", 1, *scaled(trained, encoder))


def test_it_starts_with_tubes_and_encoder(run: Path, trained: Path, encoder: Path) -> None:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "initialised"]
    small, large = newest_valid(trained), newest_valid(encoder)
    assert event["from"] == {"tubes": str(small), "encoder": str(large)}
    loaded = event["loaded"]
    assert loaded["tokenizer.tubes.0.weight"] == "tubes:tokenizer.tubes.0.weight"
    assert loaded["tokenizer.tubes.1.weight"] == "encoder:tokenizer.tubes.0.weight"
    assert loaded["blocks.1.mlp.fc1.weight"] == "encoder:blocks.1.mlp.fc1.weight"
    assert event["new"] == ["gate.alpha"]
    weights = load_weights(newest_valid(run))
    assert {*loaded, *event["new"]} == set(weights)
    everything = {
        *(f"tubes:{name}" for name in load_weights(small)),
        *(f"encoder:{name}" for name in load_weights(large)),
    }
    assert {*loaded.values(), *event["unused"]} == everything
    assert weights["tokenizer.tubes.0.weight"].shape[0] == 64


def check_frozen(run: Path, trained: Path, encoder: Path) -> None:
    """What is frozen has the bits of the runs that it comes from, and what is not has changed."""
    after = load_weights(newest_valid(run))
    small, large = load_weights(newest_valid(trained)), load_weights(newest_valid(encoder))
    expected = {**large, "tokenizer.tubes.1.weight": large["tokenizer.tubes.0.weight"]}
    expected["tokenizer.tubes.1.bias"] = large["tokenizer.tubes.0.bias"]
    expected |= {
        f"tokenizer.tubes.0.{part}": small[f"tokenizer.tubes.0.{part}"] for part in ("weight", "bias")
    }
    frozen = {name for name in after if name.startswith(FROZEN)}
    assert len(frozen) == 2 * 2 + 12
    assert all(torch.equal(after[name], expected[name].to(after[name].dtype)) for name in frozen)
    trained_names = [name for name in large if name not in frozen and not name.startswith("heads.digits")]
    assert all(not torch.equal(after[name], large[name]) for name in trained_names)
    assert after["gate.alpha"] != 0


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, ()),
        (2, ("engine.zero=2",)),
        (1, ("engine.zero=3",)),
        (2, ("engine.zero=3",)),
        (2, ("engine.zero=3", "engine.precision=bf16")),
        (1, ("engine.zero=0",)),
    ],
)
def test_frozen_weights_survive_bit_by_bit_whatever_the_ranks(
    recipe_file: Path,
    run: Path,
    trained: Path,
    encoder: Path,
    tmp_path: Path,
    ranks: int,
    settings: tuple[str, ...],
) -> None:
    if ranks == 1 and not settings:
        check_frozen(run, trained, encoder)
        return
    other = train_to_end(recipe_file, tmp_path / "run", ranks, *scaled(trained, encoder), *settings)
    check_frozen(other, trained, encoder)
    tolerance = 0.02 if "engine.precision=bf16" in settings else 1e-4
    for step, metrics in journalled(run).items():
        assert journalled(other)[step]["train/loss"] == pytest.approx(metrics["train/loss"], rel=tolerance)


def test_optimizer_and_averages_hold_what_is_trained_alone(run: Path, make_recipe: Make) -> None:
    folder = newest_valid(run)
    manifest = read_manifest(folder)
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    model = build_model(recipe.model, inputs_of(recipe))
    suffix = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert set(manifest["shapes"]) == set(suffix)
    assert not any(name.startswith(FROZEN) for name in suffix)
    for kind in ("weight", "average", "exp_avg", "exp_avg_sq"):
        tensors = load_file(folder / f"{kind}-00000.safetensors")
        assert {name: tensor.numel() for name, tensor in tensors.items()} == suffix
    fixed = load_file(folder / "fixed.safetensors")
    assert set(fixed) == {name for name, _ in model.named_parameters()} - set(suffix)


@pytest.mark.parametrize(("ranks", "settings"), [(1, ()), (2, ("engine.zero=3",))])
def test_resume_is_exact_and_elastic_without_the_sources(
    recipe_file: Path, trained: Path, encoder: Path, tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    away = tmp_path / "away"
    sources = tmp_path / "sources"
    for name, folder in (("tubes", trained), ("encoder", encoder)):
        (sources / name).parent.mkdir(exist_ok=True)
        (sources / name).symlink_to(folder)
    what = scaled(sources / "tubes", sources / "encoder")
    run = train_to_end(recipe_file, tmp_path / "run", 1, *what)
    whole, last = journalled(run), load_weights(newest_valid(run))
    folder_of(run, 6).rename(away)
    sources.rename(tmp_path / "gone")
    train_to_end(recipe_file, run, ranks, *what, *settings)
    again = load_weights(newest_valid(run))
    if ranks == 1:
        assert journalled(run) == whole
        assert all(torch.equal(tensor, again[name]) for name, tensor in last.items())
    else:
        assert journalled(run)[6]["train/loss"] == pytest.approx(whole[6]["train/loss"], rel=1e-5)
        assert all(torch.equal(again[name], last[name]) for name in last if name.startswith(FROZEN))


def test_journal_shows_the_gate(run: Path) -> None:
    entries = [json.loads(line)["metrics"] for line in (run / "journal.jsonl").read_text().splitlines()]
    gates = [entry for entry in entries if "gate/ratio" in entry]
    assert len(gates) == 6
    assert gates[0]["gate/tanh_alpha"] == 0
    assert gates[-1]["gate/tanh_alpha"] != 0
    assert gates[-1]["gate/ratio"] > 0


@pytest.mark.parametrize(
    ("tubes", "large", "override", "words"),
    [
        ("encoder", "encoder", None, "has tubes of width 224, and model.scale_up.tube_width is 64"),
        ("encoder", "encoder", "model.scale_up.tube_width=224", "none, it is a model of images"),
        ("trained", "trained", None, r"init.encoder .* is of another model"),
        ("run", "encoder", None, "has bridged tubes"),
        ("trained", "run", None, "is a scale-up itself"),
        ("trained", "nothing", None, "init.encoder: .* is neither a run"),
        ("trained", "encoder", "model.tubes.0.stride=[1,8,8]", r"has no such tube for videos as tube 1 of 2"),
    ],
)
def test_sources_of_another_kind_are_refused_in_one_line(
    make_recipe: Make,
    run: Path,
    trained: Path,
    encoder: Path,
    tubes: str,
    large: str,
    override: str | None,
    words: str,
) -> None:
    folders = {"run": run, "trained": trained, "encoder": encoder, "nothing": run.parent}
    settings = list(scaled(folders[tubes], folders[large]))
    if override is not None and override.startswith("model.tubes"):
        settings.append(
            "model.tubes=[{kernel: [2, 8, 8], stride: [1, 8, 8]}, {kernel: [1, 8, 8], stride: [4, 8, 8]}]"
        )
    elif override is not None:
        settings.append(override)
    recipe = make_recipe(*settings)
    assert recipe.init is not None
    model = build_model(recipe.model, inputs_of(recipe))
    with pytest.raises(RecipeError, match=words) as caught:
        load_initial(model, recipe, find_origins(recipe.init))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["init={tubes: a}"], "init.encoder: is missing"),
        (["init={tubes: a, encoder: b, weights: c}"], "only one"),
        (["init={tubes: a, encoder: b}"], "init.tubes: needs `model.scale_up`"),
        (["model.scale_up={tube_width: 64, frozen_layers: 1}"], r"scale_up=.*: needs `init: {tubes"),
    ],
)
def test_sections_that_do_not_fit_together(make_recipe: Make, settings: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(*settings)


def test_its_tubes_are_pictured(run: Path) -> None:
    drawn = {path.name for path in (run / "pictures").iterdir()}
    assert {"kernels-1-2x8x8.png", "kernels-2-1x8x8.png"} <= drawn
