"""What a wrong recipe says: everything at once, each at its line, with what would have been right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from framework.errors import RecipeError
from framework.recipe import load_recipe

Write = Callable[..., str]


def complaints(name: str, *overrides: str) -> list[str]:
    """The lines of the error behind its heading."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith("recipe ")
    return [line.strip() for line in lines]


def test_all_errors_at_once_each_at_its_line(write: Write) -> None:
    name = write(
        wrong="""\
name: wrong
modle: {name: tubevit_ti}
model: {name: tubevit_huge, depth: 0}
data:
  sources:
    motion: {kind: video, classes: 8, path: x, clip: {frames: 8, stide: 1}}
  mixture:
    motion: "8"
optimizer: {lr: fast}
train:
  stps: 3
engine:
  precision: fp16
"""
    )
    found = complaints(name)
    assert [line.split(": ")[0] for line in found] == [
        "wrong.yaml:2",
        "wrong.yaml:3",
        "wrong.yaml:3",
        "wrong.yaml:6",
        "wrong.yaml:8",
        "wrong.yaml:9",
        "wrong.yaml:10",
        "wrong.yaml:11",
        "wrong.yaml:13",
    ]
    text = "\n".join(found)
    assert "modle: unknown key, did you mean `model`?" in text
    assert (
        "model.name: there is no model `tubevit_huge`; did you mean `tubevit_h`? Known are tubevit_{ti,"
        in text
    )
    assert "model.depth: must be greater than 0, not 0" in text
    assert "clip.stide: unknown key, did you mean `stride`?" in text
    assert "data.mixture.motion: must be an integer greater than 0 and at most 1000000, " in text
    assert 'not text "8"; write it without quotes' in text
    assert "optimizer.lr: must be a number greater than 0, not fast" in text
    assert "train.steps: is missing; it must be an integer greater than 0" in text
    assert "train.stps: unknown key, did you mean `steps`? Keys of `train`: steps, accumulation" in text
    assert "engine.precision: must be fp32 or bf16, not fp16, did you mean `bf16`?" in text


def test_an_error_in_a_base_is_placed_in_the_base(write: Write, good: str) -> None:
    name = write(base="engine:\n  # a comment\n  zreo: 1\n", top=f"base: [{good}, base.yaml]\n")
    assert [line.split(": ")[0] for line in complaints(name)] == ["base.yaml:3"]


def test_the_file_that_wrote_the_value_last_gets_the_blame(write: Write, good: str) -> None:
    name = write(base="engine: {zero: 7}\n", top=f"base: [{good}, base.yaml]\n\nengine: {{zero: 9}}\n")
    assert complaints(name) == ["top.yaml:3: engine.zero: must be at most 3, not 9"]


def test_overrides_are_named_as_they_were_typed(good: str) -> None:
    found = complaints(good, "train.setps=4", "engine.zero=4", "train.steps", "=3", "seed=", "seed=[")
    assert found == [
        "command line: train.steps: must look like `key.path=value`, for example `train.steps=100`",
        "command line: =3: must look like `key.path=value`, for example `train.steps=100`",
        "command line: seed=: has no value; write `null` for none",
        "command line: seed=[: not YAML: expected the node content, but found the end of the text",
        *sorted(line for line in found if "setps" in line),
        "command line: engine.zero=4: must be at most 3, not 4",
    ]
    assert "train.setps=4: unknown key, did you mean `steps`?" in found[4]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "train.steps=3e5",
            "must be an integer greater than 0 and at most 1000000000, not 300000.0; write 300000",
        ),
        ("train.steps=true", "must be an integer greater than 0 and at most 1000000000, not true"),
        ("train.steps=1000000000000", "must be at most 1000000000, not 1000000000000"),
        ("train.steps=1.5", "must be an integer greater than 0 and at most 1000000000, not 1.5"),
        ("model.name=tubvit_b", "there is no model `tubvit_b`; did you mean `tubevit_b`?"),
        ("model={name: vivit_b, embedding: frames}", "model.name: there is no model `vivit_b`"),
        ("train.compile=yes", "must be true or false, not yes"),
        ("train.compile=1", "must be true or false, not 1"),
        ("optimizer.lr=.inf", "must be a number greater than 0, not .inf"),
        ("optimizer.lr='1e-3'", "write it without quotes"),
        ("optimizer.betas=[0.9]", "must have 2 values, not [0.9]"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas.1: must be less than 1.0, not 2"),
        ("model.tubes=[{kernel: [1, 2], stride: [1, 1, 1]}]", "model.tubes.0.kernel: must have 3 values"),
        (
            "model.tubes=[{stride: [1, 1, 1]}]",
            "model.tubes.0.kernel: is missing; it must be a list of 3 values",
        ),
        ("engine=3", "must be a section with the keys zero, precision, offload, bucket_mb, not 3"),
        ("engine={offload: all}", "engine.offload: all needs zero: 3"),
        ("data.mixture={}", "must not be empty"),
        ("data.mixture.movies=3", "there is no such source. Names in data.sources: motion, digits"),
        ("data.mixture.motoin=3", "data.mixture.motoin=3: there is no such source, did you mean `motion`?"),
        ("data.sources.a b.path=x", "a name has letters, digits"),
        ("data.sources.motion.clip.fps=3", "exactly one of `stride`"),
        ("train.steps.more=1", "`train.steps` is 100, not a section: it has no `more`"),
        ("optimizer.betas.7=1", "must be a list of 2 values, each a number"),
        ("name=no spaces please", "must match"),
        ("base=other.yaml", "`base` belongs into the recipe file"),
        ("tracking.uri=*all", "anchors and aliases"),
    ],
)
def test_sentences(good: str, override: str, complaint: str) -> None:
    found = complaints(good, override)
    assert any(complaint in line for line in found), found


def test_rules_over_several_sections_name_one_value(good: str) -> None:
    assert complaints(good, "schedule.warmup=100") == [
        "command line: schedule.warmup=100: must be smaller than train.steps (100), not 100"
    ]


def test_a_misspelt_source_of_the_mixture_is_listed_with_the_other_errors_of_data(good: str) -> None:
    found = complaints(good, "data.mixture.motoin=3", "data.blok=7", "data.workers=-1")
    assert len(found) == 3
    assert any("did you mean `motion`?" in line for line in found)
    broken_source = complaints(good, "data.mixture.motoin=3", "data.sources.motion.sise=7")
    assert len(broken_source) == 1, "which names there are is told once the sources are right"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "is not a mapping"),
        ("just text\n", "is not a mapping"),
        ("base: {a: b}\n", "base: must be a file name or a list of file names"),
        ("base: [3]\n", "base: must be a file name or a list of file names"),
        ("base: goood.yaml\n", "there is no file goood.yaml"),
        ("name: x\n\tmodel: y\n", "a tab stands where YAML wants spaces"),
    ],
)
def test_files_that_are_no_recipes(write: Write, good: str, text: str, complaint: str) -> None:
    found = complaints(write(bad=text))
    assert len(found) == 1
    assert complaint in found[0]
    assert found[0].startswith("bad.yaml:")


def test_a_missing_base_names_near_ones(write: Write, good: str) -> None:
    assert "did you mean good.yaml?" in complaints(write(bad="base: goood.yaml\n"))[0]


def test_bytes_that_are_no_text(write: Write, good: str) -> None:
    Path("bytes.yaml").write_bytes(b"name: \xff\xfe\n")
    assert complaints("bytes.yaml") == ["bytes.yaml: cannot be read: this is not UTF-8 text"]


def test_bases_in_a_circle_name_the_circle(write: Write) -> None:
    name = write(one="base: two.yaml\n", two="base: three.yaml\n", three="base: one.yaml\n")
    assert complaints(name) == [
        "two.yaml:1: base: goes in a circle: three.yaml → one.yaml → two.yaml → three.yaml"
    ]


def test_unknown_names_come_with_near_ones() -> None:
    with pytest.raises(RecipeError, match="did you mean demo"):
        load_recipe("demmo")
    with pytest.raises(RecipeError, match=r"there is no recipe file .*nowhere\.yaml"):
        load_recipe("no/folder/nowhere.yaml")


def test_folders_endless_files_and_impossible_names_are_no_recipes(write: Write, good: str) -> None:
    Path("run").mkdir()
    with pytest.raises(RecipeError, match=r"run is a folder, and a recipe is a file$"):
        load_recipe("run")
    Path("run/recipe.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError, match=r"did you mean run/recipe\.yaml\?"):
        load_recipe("run")
    Path("folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.yaml is a folder"):
        load_recipe("folder.yaml")
    assert "this is no recipe" in complaints(write(long="# " + "long " * 300_000))[0]
    for name in ("n" * 300, "~nobody-has-this-name/a.yaml"):
        with pytest.raises(RecipeError, match="cannot look for a recipe"):
            load_recipe(name)
        assert "there is no file" in complaints(write(based=f"base: {name}\n"))[0]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.depth=1000000000", "must be at most 1000"),
        ("train.log_every=100000000000000000000", "must be at most 1000000000000"),
        ("evaluation.batch=9999999999", "must be at most 1000000"),
        ("model.width=1000000000", "must be at most 1000000"),
        ("data.workers=100000", "must be at most 1000"),
        (f"seed={2**63}", f"must be less than {2**63}"),
        ("optimizer.betas=[0.9, 1.0]", "must be less than 1"),
        ("data.sources.motion.path=''", "must not be empty"),
        ("data.sources.motion.augment.crop_area=[1.0, 0.5]", "the smaller one first, not [1.0, 0.5]"),
        ("data.sources.motion.augment.crop_ratio=[0.0, 1.0]", "two numbers greater than 0"),
        (f"name={'n' * 200}", "must match"),
    ],
)
def test_values_that_could_only_fail_later(good: str, override: str, complaint: str) -> None:
    (found,) = complaints(good, override)
    assert found.startswith("command line: ")
    assert complaint in found


@pytest.mark.parametrize("index", ["²", "9" * 5000, "-1", "00", "x"])
def test_numbers_that_no_list_has(index: str) -> None:
    (found,) = complaints("demo", f"model.tubes.{index}.kernel=[1, 1, 1]")
    assert f"`{index}` is not one of its numbers from 0" in found


def test_a_missing_model_is_asked_for_in_words(write: Write) -> None:
    (found,) = [line for line in complaints(write(wrong="name: wrong\n")) if " model: " in line]
    assert found.endswith("must be a section with a `name`, and the keys that go with it")
