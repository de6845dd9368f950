"""Names, sizes and overrides; the parameter totals of the paper; what `describe` says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from framework.errors import ModelError, RecipeError
from framework.models import InputSpec, TubeViT, build_model, inputs_of, model_names
from framework.models.cost import count_parameters, forward_cost
from framework.models.describe import describe, describe_command
from framework.models.registry import size_of
from framework.models.video_model import VideoModel
from framework.recipe.schema import Model, Pool, Recipe, Tube, ViT

# the two classifiers of the paper's joint training (§3.5): Kinetics-600 and ImageNet-1k
JOINT = {"video": InputSpec("video", 32, 224, 600), "image": InputSpec("image", 1, 224, 1000)}


def on_meta(name: str) -> TubeViT:
    with torch.device("meta"):
        model = build_model(Model(name=name), JOINT)
    assert isinstance(model, TubeViT)
    return model


def expected_parameters(name: str) -> int:
    """The same count in closed form."""
    size = size_of(Model(name=name))
    width, hidden = size.width, size.mlp_width
    block = 4 * width**2 + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    # kernel volumes over the number of sub-tubes, and biases
    tubes = 3 * width * (512 // 2 + 256 // 4 + 576 + 256) + width // 2 + width // 4 + 2 * width
    pool = size.heads * width + width**2 + width
    return size.depth * block + 2 * width + tubes + pool + 1600 * (width + 1)


@pytest.mark.parametrize("name", model_names("tubevit"))
def test_every_size_has_the_parameters_of_its_formula(name: str) -> None:
    assert count_parameters(on_meta(name)).total == expected_parameters(name)


@pytest.mark.parametrize(("name", "total", "encoder"), [("b", 90, 86), ("l", 311, 307), ("h", 635, 632)])
def test_parameters_are_those_of_the_paper(name: str, total: int, encoder: int) -> None:
    """B to the printed digit, L and H within 1.5 %: `registry.SIZES` says where the rest lies."""
    counts = count_parameters(on_meta(f"tubevit_{name}"))
    tolerance = 0.5e6 if name == "b" else 0.015 * total * 1e6
    assert counts.total == pytest.approx(total * 1e6, abs=tolerance)
    assert counts.encoder == pytest.approx(encoder * 1e6, abs=tolerance)


def test_counts_of_the_parts_add_up() -> None:
    model = on_meta("tubevit_s")
    counts = count_parameters(model)
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    norm = 2 * model.size.width
    assert counts.total == blocks + norm + counts.tokenizer + counts.pool + sum(counts.heads.values())
    assert counts.encoder == blocks + norm + counts.tubes[3]


@pytest.mark.parametrize("pool", get_args(Pool))
@pytest.mark.parametrize(("clip", "classes"), [((16, 32), 5), ((1, 32), 7)])
def test_cost_is_what_torch_counts(clip: tuple[int, int], classes: int, pool: Pool) -> None:
    tubes = (
        Tube(kernel=(4, 8, 8), stride=(8, 16, 16), space_to_depth=(2, 1, 1)),
        Tube(kernel=(1, 8, 8), stride=(16, 8, 8)),
    )
    spec = InputSpec("video", *clip, classes)
    model = build_model(Model(name="tubevit_ti", depth=2, tubes=tubes, pool=pool), {"source": spec})
    assert isinstance(model, TubeViT)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model({"source": torch.zeros(1, 3, clip[0], clip[1], clip[1])})
    assert forward_cost(model, spec).flops == counter.get_total_flops()


@pytest.mark.parametrize("mlp_width", [768, 100])
def test_a_tubevit_of_patches_alone_costs_what_the_vit_does(mlp_width: int) -> None:
    spec = InputSpec("image", 1, 64, 5)
    patches = (Tube(kernel=(1, 16, 16), stride=(1, 16, 16)),)
    tubes = Model(name="tubevit_ti", tubes=patches, pool="class_token", mlp_width=mlp_width)
    with torch.device("meta"):
        ours = build_model(tubes, {"source": spec})
        theirs = build_model(ViT(name="vit_ti", mlp_width=mlp_width), {"source": spec})
    assert isinstance(ours, TubeViT)
    assert isinstance(theirs, VideoModel)
    assert forward_cost(ours, spec) == theirs.work(spec)


def test_cost_is_that_of_the_paper() -> None:
    """72.5 G a view in Table 1 (0.87 T for 4x3 views): 735 tokens, one multiply-add counted once."""
    tubes = [tube.model_dump() for tube in on_meta("tubevit_b").tokenizer.shapes]
    tubes[3]["stride"] = (16, 16, 16)
    with torch.device("meta"):
        model = build_model(Model.model_validate({"name": "tubevit_b", "tubes": tubes}), JOINT)
    assert isinstance(model, TubeViT)
    assert 12 * forward_cost(model, JOINT["video"]).multiply_adds == pytest.approx(0.87e12, rel=0.01)


def test_single_numbers_can_be_overridden() -> None:
    size = size_of(Model(name="tubevit_b", width=96, depth=5, heads=6))
    assert (size.width, size.depth, size.heads, size.mlp_width) == (96, 5, 6, 384)
    assert size_of(Model(name="tubevit_l", mlp_width=100)).mlp_width == 100


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"name": "tubevit_ti", "width": 100},
            "width 100 cannot be cut into 3 heads; model.heads that work: 1, 2, 4",
        ),
        ({"name": "tubevit_ti", "dropout": 1.0}, "model.dropout must be smaller than 1"),
    ],
)
def test_models_that_cannot_be(model: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_model(Model.model_validate(model), JOINT)


@pytest.mark.parametrize("name", ["my.data", "type", "keys", ""])
def test_source_names_that_cannot_name_a_classifier(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot name a source"):
        build_model(Model(name="tubevit_ti", depth=1), {name: JOINT["image"]})


def test_a_source_that_does_not_fit_is_named_with_the_tube() -> None:
    inputs = {**JOINT, "short": InputSpec("video", 19, 224, 4)}
    with pytest.raises(ModelError, match=r"source short: tube 2 of 4 .*at least 20"):
        build_model(Model(name="tubevit_ti"), inputs)


def recipe_values() -> dict[str, object]:
    return {
        "name": "test",
        "model": {"name": "tubevit_s"},
        "data": {
            "sources": {
                "clips": {"path": "a", "kind": "video", "classes": 4, "clip": {"frames": 32, "stride": 2}},
                "photos": {"path": "b", "kind": "image", "classes": 9, "size": 160},
            },
            "mixture": {"clips": 2, "photos": 2},
        },
        "optimizer": {"lr": 0.1},
        "train": {"steps": 1},
    }


def test_inputs_of_a_recipe() -> None:
    assert inputs_of(Recipe.model_validate(recipe_values())) == {
        "clips": InputSpec("video", 32, 224, 4),
        "photos": InputSpec("image", 1, 160, 9),
    }


def test_describe_h_is_fast_and_right() -> None:
    start = time.perf_counter()
    description = describe("tubevit_h")
    assert time.perf_counter() - start < 3
    assert description["parameters"] == expected_parameters("tubevit_h")
    video, image = description["sources"]["video"], description["sources"]["image"]
    assert (video["tokens"], image["tokens"]) == (539, 196)
    assert [grid["tokens"] for grid in video["grids"]] == [98, 147, 98, 196]
    assert [grid["tube"] for grid in image["grids"]] == [3]
    assert json.loads(json.dumps(description)) == description


def test_describe_takes_overrides_and_recipes(tmp_path: Path) -> None:
    description = describe("tubevit_b", ["data.sources.video.clip.frames=64", "model.depth=2"])
    assert description["depth"] == 2
    assert description["sources"]["video"]["tokens"] == 1176
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(recipe_values()))  # JSON is YAML
    mine = describe(str(path), ["data.sources.photos.size=224"])
    assert mine["name"] == "tubevit_s"
    assert mine["sources"]["photos"]["tokens"] == 196


def test_describe_of_something_unknown_names_what_is_near() -> None:
    with pytest.raises(RecipeError, match="did you mean `tubevit_b`"):
        describe("tubevit_bb")
    with pytest.raises(RecipeError, match="depth"):
        describe("tubevit_b", ["model.dept=2"])


def test_describe_writes_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    describe_command("tubevit_ti", as_json=True)
    assert json.loads(capsys.readouterr().out) == describe("tubevit_ti")
    describe_command("tubevit_ti")
    written = capsys.readouterr().out
    for word in ("tubevit_ti", "539", "16x4x4", f"{expected_parameters('tubevit_ti'):,}"):
        assert word in written
