"""The oracle: published figures that close, what JSON says, and the search for tube sets."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from framework.errors import ModelError, RecipeError
from framework.models.coverage import coverage
from framework.models.describe import describe, describe_command, search_command, search_tubes
from framework.models.tubes import grids_of, sub_stride
from framework.recipe.schema import Tube
from framework.recipe.tube_sets import PAPER_TUBES, TUBE_SETS


def test_json_has_the_keys_that_programs_rely_on() -> None:
    described = describe("tubevit_b")
    assert described["name"] == "tubevit_b"
    assert described["tokens"] == {"video": 539, "image": 196}
    assert isinstance(described["parameters"], int)
    assert isinstance(described["encoder_parameters"], int)
    assert set(described["cost"]) == {"mac", "hlo_half", "flop"}
    assert described["cost"] == described["sources"]["video"]["cost"]
    assert described["cost"]["flop"] == 2 * described["cost"]["mac"]
    assert [tube["kernel"] for tube in described["tubes"]] == [list(tube.kernel) for tube in PAPER_TUBES]
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [([], 539), (["model.tube_set=paper_dense"], 735), (["data.sources.video.clip.frames=64"], 1176)],
)
def test_published_tokens(overrides: list[str], tokens: int) -> None:
    assert describe("tubevit_b", overrides)["tokens"]["video"] == tokens


@pytest.mark.parametrize(
    ("name", "total", "encoder", "tolerance"),
    [("b", 90, 86, 0.006), ("l", 311, 307, 0.013), ("h", 635, 632, 0.005)],
)
def test_published_parameters(name: str, total: int, encoder: int, tolerance: float) -> None:
    """docs/published.md says where the rest lies."""
    described = describe(f"tubevit_{name}")
    assert described["parameters"] / 1e6 == pytest.approx(total, rel=tolerance)
    assert described["encoder_parameters"] / 1e6 == pytest.approx(encoder, rel=tolerance)


@pytest.mark.parametrize(
    ("tube_set", "published"), [("paper_dense", 72), ("paper_dense", 72.5), ("eight", 74)]
)
def test_published_cost(tube_set: str, published: float) -> None:
    """Table 7 prints 72 G for four tubes and 74 G for eight; Table 1 prints 0.87 T for twelve views."""
    described = describe("tubevit_b", [f"model.tube_set={tube_set}"])
    assert described["tokens"]["video"] == 735
    assert described["cost"]["mac"] == pytest.approx(published, rel=0.015)


def test_classes_and_class_tokens_count() -> None:
    plain, with_token = describe("tubevit_ti"), describe("tubevit_ti", ["model.pool=class_token"])
    assert with_token["tokens"]["video"] == plain["tokens"]["video"] + 1
    groups = with_token["parameter_groups"]
    assert (groups["class_token"], groups["pool"]) == (192, 0)


def test_all_parameters_belong_to_a_group() -> None:
    options = ["model.kernels=interpolated", "model.position=learned", "model.pool=map"]
    described = describe("tubevit_s", options)
    groups, size = described["parameter_groups"], described["width"]
    parts = sum(groups[key] for key in ("tokenizer", "positions", "class_token", "pool"))
    patch = described["tubes"][3]["parameters"]
    assert described["parameters"] == groups["encoder"] - patch + parts + sum(groups["heads"].values())
    assert groups["shared_kernel"] == size * 3 * 8**3
    assert groups["positions"] == 539 * size


def read_by(tubes: tuple[Tube, ...], clip: tuple[int, int, int]) -> np.ndarray:
    """The pixels that tubes read, marked one box after the other."""
    marked = np.zeros(clip, dtype=bool)
    for grid in grids_of(tubes, clip):
        tube = tubes[grid.tube]
        counts = [count * factor for count, factor in zip(grid.shape, tube.space_to_depth, strict=True)]
        for place in np.ndindex(*counts):
            starts = [o + n * s for o, n, s in zip(tube.offset, place, sub_stride(tube), strict=True)]
            marked[tuple(slice(a, a + k) for a, k in zip(starts, tube.kernel, strict=True))] = True
    return marked


@pytest.mark.parametrize("name", ["one", "two", "paper", "paper_dense", "eight"])
def test_coverage_is_what_boxes_mark(name: str) -> None:
    clip = (32, 224, 224)
    assert coverage(TUBE_SETS[name], clip) == pytest.approx(read_by(TUBE_SETS[name], clip).mean(), abs=1e-12)


def test_the_paper_s_tubes_read_a_sixth_of_a_clip() -> None:
    assert coverage(PAPER_TUBES, (32, 224, 224)) == pytest.approx(0.175, abs=0.001)
    assert coverage(PAPER_TUBES, (1, 224, 224)) == 1


def test_search_stays_under_its_budget_and_is_true() -> None:
    start = time.process_time()
    result = search_tubes("tubevit_b", gmac=60)
    assert time.process_time() - start < 10
    assert result["own"]["tokens"] == 539
    assert len(result["found"]) == 10
    shares = [round(found["coverage"], 3) for found in result["found"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > result["own"]["coverage"]
    for found in result["found"][:3]:
        tubes = tuple(Tube.model_validate(tube) for tube in found["tubes"])
        assert found["coverage"] == pytest.approx(coverage(tubes, (32, 224, 224)))
        described = describe("tubevit_b", [f"model.tubes={json.dumps(found['tubes'])}"])
        assert described["tokens"]["video"] == found["tokens"]
        assert described["cost"]["mac"] == pytest.approx(found["gmac"])
        assert found["gmac"] <= 60
        assert described["tokens"]["image"] == 196


def test_search_keeps_to_its_own_cost_by_default() -> None:
    result = search_tubes("tubevit_ti", ["data.sources.video.clip.frames=16", "model.tube_set=two"])
    assert all(found["gmac"] <= result["own"]["gmac"] for found in result["found"])
    assert math.isclose(result["gmac"], result["own"]["gmac"])


def test_a_budget_that_nothing_meets_names_the_cheapest() -> None:
    with pytest.raises(RecipeError, match=r"at most 1 GMAC; the cheapest.* costs 17.48"):
        search_tubes("tubevit_b", gmac=1)


def test_search_writes_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    search_command("tubevit_ti", gmac=3, as_json=True)
    found = json.loads(capsys.readouterr().out)["found"]
    search_command("tubevit_ti", gmac=3)
    assert f"{found[0]['coverage']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tube", "message"),
    [
        ("{kernel: [64, 8, 8], stride: [16, 16, 16]}", r"source video: tube 1 of 2 .*at least 64"),
        ("{kernel: [8, 8, 8], stride: [0, 16, 16]}", r"tubes\.0\.stride\.0: must be greater than 0, not 0"),
        (
            "{kernel: [8, 8, 8], stride: [16, 32, 32], space_to_depth: [3, 1, 1]}",
            r"tube 1 of 2 .*stride of 16 frames, which its Space-to-Depth factor 3 does not divide",
        ),
        (
            "{kernel: [8, 8, 8], stride: [16, 32, 32], space_to_depth: [4, 1, 1]}",
            r"tube 1 of 2 .*7 sub-tubes of 32 frames, which its Space-to-Depth factor 4 does not divide",
        ),
    ],
)
def test_bad_tubes_give_one_clear_line(tube: str, message: str) -> None:
    tubes = f"model.tubes=[{tube}, {{kernel: [1, 16, 16], stride: [16, 16, 16]}}]"
    with pytest.raises((RecipeError, ModelError), match=message):
        describe("tubevit_b", [tubes])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.heads=7"], "width 768 cannot be cut into 7 heads; model.heads that work: 1, 2, 3, 4"),
        (["model.tube_set=tow"], "must be one, two, .* did you mean `two`"),
        (["model.tube_set=two", "model.tubes=[{kernel: [1, 8, 8], stride: [8, 8, 8]}]"], "beside `tubes`"),
        (["model.interpolate_2d=true"], "needs `kernels: interpolated`"),
    ],
)
def test_options_that_do_not_fit_give_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        describe("tubevit_b", overrides)


def test_what_sparse_tubes_leave_out_at_the_edges_is_part_of_the_share_read() -> None:
    whole, odd = (
        describe("tubevit_b", [f"data.sources.image.size={size}"])["sources"]["image"] for size in (224, 225)
    )
    assert odd["tokens"] == whole["tokens"], "a row and a column too few for another patch"
    assert whole["coverage"] == 1
    assert odd["coverage"] == pytest.approx(224**2 / 225**2)


def test_an_unknown_name_gets_the_nearest_and_the_families() -> None:
    with pytest.raises(RecipeError) as caught:
        describe("tubevit_x")
    first, *lines = str(caught.value).splitlines()
    assert "did you mean `tubevit_s` or `tubevit_l` or `tubevit_h`?" in first
    assert "  timesformer_{ti,s,b,l,h}_{divided,joint,space}" in lines
    assert "  mtv_b" in lines
    assert all(len(line) < 100 for line in lines)


@pytest.mark.parametrize("name", ["tubevit_b", "vit_b"])
def test_several_views_of_a_sample_are_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    describe_command(name)
    assert "views" not in capsys.readouterr().out
    repeats = ["data.mixture={image: 8}", "data.sources.image.repeats=4"]
    describe_command(name, repeats)
    assert "4 views of 1x224x224" in capsys.readouterr().out
    assert describe(name, repeats)["sources"]["image"]["repeats"] == 4
