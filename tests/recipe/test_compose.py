"""How bases, files and overrides become one recipe, and that each value knows where it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.recipe import Recipe, dump_yaml, flatten, load_recipe, recipe_hash, recipe_names
from framework.recipe.compose import _merge
from framework.recipe.document import Node, Origin, plain
from framework.recipe.show import report, show

Write = Callable[..., str]

TREES = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


def node(value: Any) -> Node:
    """The value as a tree of nodes."""
    if isinstance(value, dict):
        return Node({key: node(child) for key, child in value.items()}, Origin("file"))
    if isinstance(value, list):
        return Node([node(child) for child in value], Origin("file"))
    return Node(value, Origin("file"))


def merge(*values: Any) -> Any:
    """Later over earlier."""
    merged = node(values[0])
    for value in values[1:]:
        merged = _merge(merged, node(value))
    return plain(merged)


@given(TREES)
def test_merging_with_itself_or_nothing_changes_nothing(tree: Any) -> None:
    assert merge(tree, tree) == tree
    if isinstance(tree, dict):
        assert merge(tree, {}) == tree == merge({}, tree)


@given(TREES, TREES)
def test_everything_the_later_says_stands(early: Any, late: Any) -> None:
    merged = merge(early, late)
    if not isinstance(late, dict) or not isinstance(early, dict):
        assert merged == late
        return
    assert merged.keys() == early.keys() | late.keys()
    for key in merged:
        if key not in late:
            assert merged[key] == early[key]
        elif key not in early:
            assert merged[key] == late[key]
        else:
            assert merged[key] == merge(early[key], late[key])


def test_later_bases_and_the_file_itself_win(write: Write, good: str) -> None:
    name = write(
        one="seed: 1\nengine: {zero: 1, bucket_mb: 10}\n",
        two="seed: 2\nengine: {zero: 2}\n",
        top=f"base: [{good}, one.yaml, two.yaml]\nname: top\noptimizer:\n  betas: [0.5, 0.6]\n",
    )
    resolved = load_recipe(name)
    recipe = resolved.recipe
    assert (recipe.name, recipe.seed, recipe.engine.zero, recipe.engine.bucket_mb) == ("top", 2, 2, 10)
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-3, (0.5, 0.6))
    assert {key: resolved.provenance[key] for key in ("name", "seed", "engine.zero", "engine.bucket_mb")} == {
        "name": "top.yaml:2",
        "seed": "two.yaml:1",
        "engine.zero": "two.yaml:2",
        "engine.bucket_mb": "one.yaml:2",
    }
    assert resolved.provenance["optimizer.lr"] == "good.yaml:16"
    assert resolved.provenance["optimizer.betas"] == "top.yaml:4"
    assert resolved.provenance["engine.offload"] == "default"
    assert [path.name for path in resolved.files] == ["top.yaml", "good.yaml", "one.yaml", "two.yaml"]


def test_bases_lie_beside_the_file_that_names_them(write: Write, good: str) -> None:
    Path("sub").mkdir()
    Path("sub/inner.yaml").write_text("base: deeper.yaml\n")
    Path("sub/deeper.yaml").write_text("base: ../good.yaml\nseed: 7\n")
    assert load_recipe(write(top="base: sub/inner.yaml\n")).recipe.seed == 7


def test_one_base_by_two_ways_is_no_circle(write: Write, good: str) -> None:
    name = write(
        left=f"base: {good}\n", right=f"base: {good}\nseed: 3\n", top="base: [left.yaml, right.yaml]\n"
    )
    assert load_recipe(name).recipe.seed == 3


def test_bases_are_found_among_the_installed_recipes(write: Write) -> None:
    name = write(mine="base: [tubevit_b_k400_in1k.yaml]\nname: mine\ntrain: {steps: 20000}\n")
    recipe = load_recipe(name).recipe
    assert (recipe.name, recipe.train.steps, recipe.model.name) == ("mine", 20000, "tubevit_b")


def test_overrides_win_and_are_typed_as_yaml(good: str) -> None:
    resolved = load_recipe(
        good,
        [
            "optimizer.lr=5e-4",
            "data.mixture.motion=4",
            "model.tubes=[{kernel: [1, 8, 8], stride: [8, 8, 8]}]",
            "model.tubes.0.offset=[0, 1, 1]",
            "data.sources.motion.augment.randaugment.layers=3",
            "tracking.uri=http://host:5000",
            "train.ema_decay=null",
            "engine.zero=0",
            "engine.zero=2",
        ],
    )
    recipe = resolved.recipe
    assert recipe.optimizer.lr == 5e-4
    assert recipe.data.mixture == {"motion": 4, "digits": 16}
    assert recipe.model.tubes is not None
    assert (recipe.model.tubes[0].kernel, recipe.model.tubes[0].offset) == ((1, 8, 8), (0, 1, 1))
    assert recipe.data.sources["motion"].augment.randaugment is not None
    assert recipe.data.sources["motion"].augment.randaugment.layers == 3
    assert (recipe.tracking.uri, recipe.train.ema_decay, recipe.engine.zero) == ("http://host:5000", None, 2)
    assert resolved.provenance["data.mixture.motion"] == "override"
    assert resolved.provenance["data.mixture.digits"] == "good.yaml:14"


def test_an_override_of_a_whole_section_replaces_it(good: str) -> None:
    assert load_recipe(good, ["data.mixture={digits: 4}"]).recipe.data.mixture == {"digits": 4}


@pytest.mark.parametrize("name", recipe_names())
def test_every_installed_recipe_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.name == Path(name).name
    assert recipe.description
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(copy)).recipe == recipe
    assert recipe_hash(load_recipe(str(copy)).recipe) == recipe_hash(recipe)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    description=st.text(st.characters(codec="utf-8"), max_size=30),
    lr=st.floats(1e-12, 1e12),
    seed=st.integers(0, 2**63 - 1),
    published=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=9), st.text(max_size=9), max_size=2
    ),
)
def test_any_values_survive_a_round_trip(
    good: str, description: str, lr: float, seed: int, published: dict[str, str]
) -> None:
    recipe = load_recipe(good).recipe
    update = {"description": description, "seed": seed, "published": published}
    recipe = recipe.model_copy(update={**update, "optimizer": recipe.optimizer.model_copy(update={"lr": lr})})
    Path("copy.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    assert load_recipe("copy.yaml").recipe == recipe


def test_the_hash_depends_on_values_alone(write: Write, good: str) -> None:
    plain_hash = recipe_hash(load_recipe(good).recipe)
    assert recipe_hash(load_recipe(write(other=f"base: {good}\n")).recipe) == plain_hash
    assert recipe_hash(load_recipe(good, ["optimizer.lr=0.001"]).recipe) == plain_hash
    assert recipe_hash(load_recipe(good, ["seed=1"]).recipe) != plain_hash


def test_every_leaf_has_an_origin(good: str) -> None:
    resolved = load_recipe(good, ["model.tubes=[{kernel: [1, 8, 8], stride: [8, 8, 8]}]"])
    assert resolved.provenance.keys() == flatten(resolved.recipe).keys()
    assert resolved.provenance["model.tubes.0.kernel"] == "override"
    assert flatten(resolved.recipe)["model.tubes.0.kernel"] == [1, 8, 8]


def test_a_name_with_a_dot_has_its_origin(write: Write, good: str) -> None:
    name = write(top=f'base: {good}\npublished: {{"top-1 at 1.5x": "80"}}\n')
    assert load_recipe(name).provenance["published.top-1 at 1.5x"] == "top.yaml:2"


def test_what_is_shown_is_a_recipe_and_names_origins(write: Write, good: str) -> None:
    resolved = load_recipe(good, ["seed=5", "model.tubes=[{kernel: [1, 8, 8], stride: [8, 8, 8]}]"])
    text = show(resolved)
    assert load_recipe(write(shown=text)).recipe == resolved.recipe
    lines = {line.split("#")[0].strip(): line.partition("# ")[2] for line in text.splitlines()}
    assert lines["seed: 5"] == "override"
    assert lines["lr: 0.001"] == "good.yaml:16"
    assert lines["zero: 1"] == "default"
    assert next(origin for line, origin in lines.items() if line.startswith("- {kernel")) == "override"


def test_the_report_is_complete(good: str) -> None:
    resolved = load_recipe(good)
    found = report(resolved)
    assert Recipe.model_validate(found["recipe"]) == resolved.recipe
    assert found["files"] == ["good.yaml"]
    assert found["hash"] == recipe_hash(resolved.recipe)
