"""The oracle for ViT, ViViT, TimeSformer, VideoMAE and MTV: published figures that close."""

from __future__ import annotations

import json

import pytest

from framework.errors import RecipeError
from framework.models.describe import describe, describe_command, search_tubes

FRAMES, SIZE = "data.sources.video.clip.frames", "data.sources.video.size"


@pytest.mark.parametrize(
    ("name", "gflops", "parameters"),
    [
        ("vivit_b_m1", 455.2, 88.9),
        ("vivit_b_m2", 284.4, 115.1),
        ("vivit_b_m3", 372.3, 117.3),
        ("vivit_b_m4", 277.1, 88.9),
        ("vivit_b_avgpool", 283.9, 86.7),
    ],
)
def test_table_2_of_vivit(name: str, gflops: float, parameters: float) -> None:
    """arXiv 2103.15691 v2; 100.7 M for model 2 in version 1 is an erratum."""
    described = describe(name)
    assert described["cost"]["hlo_half"] == pytest.approx(gflops, rel=3e-4)
    assert described["parameters"] / 1e6 == pytest.approx(parameters, abs=0.06)


@pytest.mark.parametrize(
    ("name", "overrides", "key", "published"),
    [
        # arXiv 2103.15691, GFLOPs of ViViT-L/16x2 in the first version
        ("vivit_l_m1", [], "hlo_half", 1446),
        ("vivit_l_m1", [f"{SIZE}=320"], "hlo_half", 3992),
        # the second version's 11.94 TFLOPs of 3 views, 128 frames; with four temporal layers it were 11.89
        ("vivit_l_m2", [f"{FRAMES}=128", "model.temporal_depth=24"], "hlo_half", 11940 / 3),
        # arXiv 2102.05095, Table 2: TFLOPs of 3 views; TimeSformer, HR and L (more frames, not width)
        ("timesformer_b_divided", [], "mac", 590 / 3),
        ("timesformer_b_divided", [f"{FRAMES}=16", f"{SIZE}=448"], "mac", 5110 / 3),
        ("timesformer_b_divided", [f"{FRAMES}=96"], "mac", 7140 / 3),
        # arXiv 2203.12602, Table 7
        ("videomae_s", [], "mac", 57),
        ("videomae_b", [], "mac", 180),
        ("videomae_l", [], "mac", 597),
        ("videomae_h", [], "mac", 1192),
        # ViT (arXiv 2010.11929), as timm counts
        ("vit_b", [], "mac", 17.58),
        ("vit_l", [], "mac", 61.6),
        ("vit_h", [], "mac", 167.4),
    ],
)
def test_published_operations(name: str, overrides: list[str], key: str, published: float) -> None:
    assert describe(name, overrides)["cost"][key] == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        ("timesformer_b_divided", 121.4, 0.2),
        ("videomae_s", 22, 0.5),
        ("videomae_b", 87, 0.5),
        ("videomae_l", 305, 0.8),
        ("videomae_h", 633, 0.9),
        ("vit_ti", 5.72, 0.005),
        ("vit_s", 22.05, 0.005),
        ("vit_b", 86.57, 0.005),
        ("vit_l", 304.33, 0.005),
        ("vit_h", 632.05, 0.005),
    ],
)
def test_published_parameters(name: str, published: float, tolerance: float) -> None:
    assert describe(name)["parameters"] / 1e6 == pytest.approx(published, abs=tolerance)


def test_temporal_layers_of_model_2() -> None:
    """Table 5 of version 2; with two layers the parameters are those that version 1 prints for four."""
    assert describe("vivit_b_m2", ["model.temporal_depth=2"])["parameters"] / 1e6 == pytest.approx(
        100.9, abs=0.05
    )
    costs = [describe("vivit_b_m2", [f"model.temporal_depth={n}"])["cost"]["hlo_half"] for n in (1, 4, 8, 12)]
    assert costs == sorted(costs)
    assert costs[-1] - costs[0] < 2


def test_all_parameters_belong_to_a_part() -> None:
    for name in ("vivit_ti_m2", "mtv_b", "timesformer_s_divided", "videomae_s"):
        described = describe(name)
        groups = dict(described["parameter_groups"])
        heads = groups.pop("heads")
        assert sum(groups.values()) + sum(heads.values()) == described["parameters"]
        assert described["encoder_parameters"] == sum(groups.values())


def test_pretraining_sees_a_tenth_of_the_tokens() -> None:
    plain, masked = (describe("videomae_b", o) for o in ([], ["model.pretrain={ratio: 0.9}"]))
    assert masked["cost"]["mac"] < 0.25 * plain["cost"]["mac"]
    assert masked["parameter_groups"]["heads"] == {}
    assert masked["parameter_groups"]["decoder"] > 0


def test_json_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    describe_command("mtv_b", as_json=True)
    described = json.loads(capsys.readouterr().out)
    assert described == json.loads(json.dumps(describe("mtv_b")))
    assert [grid["shape"] for grid in described["sources"]["video"]["grids"]] == [
        [16, 14, 14],
        [8, 14, 14],
        [4, 14, 14],
    ]
    describe_command("mtv_b")
    written = capsys.readouterr().out
    for word in ("mtv_b", "8x16x16", "4x14x14", f"{described['parameters']:,}"):
        assert word in written


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "vivit_b_m1",
            "model.tublet=[2, 16, 16]",
            r"model.tublet=.*did you mean `tubelet`\? Keys of `model`:",
        ),
        ("vivit_b_m1", "model.tubelet=[2, 16]", "must have 3 values"),
        ("vivit_b_m1", "model.tubelet=[2, 16, 0]", "must be greater than 0, not 0"),
        ("vivit_b_m1", "model.gelu=tanhh", "must be exact or tanh, not tanhh, did you mean `tanh`"),
        ("vivit_b_m1", "model.tube_set=one", "unknown key"),
        ("vivit_b_m4", "model.pool=class_token", "models 3 and 4"),
        ("vivit_b_m3", "model.temporal_depth=2", "belongs to model 2 alone, and this is vivit_b_m3"),
        ("vivit_b_m1", "model.order=time_space", "belongs to model 3 alone"),
        ("mtv_b", "model.views=[]", "shortest tubelets to the longest"),
        ("mtv_b", "model.views=[{frames: 2}]", r"is missing; it must be an integer greater than 0"),
        ("vivit_b_m6", "model.depth=2", "did you mean `vivit_b_m"),
    ],
)
def test_wrong_sections_name_what_is_wrong(name: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        describe(name, [override])


def test_no_tubes_to_search_for() -> None:
    with pytest.raises(RecipeError, match="no TubeViT"):
        search_tubes("vivit_b_m1")
