"""What `launch submit` refuses before anything waits in a queue: it is what `train` would refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import RecipeError
from launch.submit import check_name, prepare_run
from launch.wishes import Wishes

RECIPE = """\
name: tiny
model: {{name: {model}}}
data:
  sources:
    digits: {{path: {shards}, kind: image, classes: 10, size: 32}}
  mixture: {{digits: 8}}
optimizer: {{lr: 1e-3}}
train: {{steps: 2}}
tracking: {{mlflow: false}}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_tools.synth import SynthOptions, synthesize

    folder = tmp_path_factory.mktemp("data") / "shards"
    counts = {"train_videos": 2, "val_videos": 2, "train_images": 16, "val_images": 10}
    synthesize(SynthOptions(folder, frames=4, **counts))  # type: ignore[arg-type]
    return folder / "train"


def submit(folder: Path, model: str, shards: Path, *overrides: str) -> Path:
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(model=model, shards=shards))
    run = folder / "run"
    prepare_run(str(recipe), overrides, Wishes(ranks_per_node=1), None, run, local=True)
    return run


def test_tubes_that_nothing_reads(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(RecipeError, match="tube"):
        submit(tmp_path, "tubevit_ti", shards)
    assert not (tmp_path / "run").exists()


def test_clips_that_patches_do_not_divide_and_only_of_a_run_that_is_new(tmp_path: Path, shards: Path) -> None:
    odd = "data.sources.digits.size=40"
    with pytest.raises(RecipeError, match=r"digits\.size is 40, .*32 or 48"):
        submit(tmp_path, "vit_ti", shards, odd)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"version": 1, "plan": "", "attempts": [{}]}')
    (tmp_path / "run" / "recipe.yaml").write_text(
        RECIPE.format(model="vit_ti", shards=shards).replace("size: 32", "size: 40")
    )
    assert (submit(tmp_path, "vit_ti", shards, odd) / "code").is_dir()


def test_a_folder_of_something_else(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError, match=r"is no run, and holds thesis\.tex"):
        submit(tmp_path, "vit_ti", shards)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_becomes_the_run(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "run").mkdir()
    run = submit(tmp_path, "vit_ti", shards)
    assert (run / "recipe.yaml").is_file()
    assert (run / "code").is_dir()


@pytest.mark.parametrize("name", ["50%", "it's", 'a"b', "a,b", "a\\b"])
def test_what_only_slurm_misreads_is_a_name_on_this_machine(name: str) -> None:
    check_name(Path("/runs") / name, in_container=True, local=True)
    with pytest.raises(RecipeError, match="cannot be used"):
        check_name(Path("/runs") / name, in_container=True)


def test_what_python_misreads_is_a_name_nowhere() -> None:
    for local in (False, True):
        with pytest.raises(RecipeError, match="':' separates folders in PYTHONPATH"):
            check_name(Path("/runs/a:b"), in_container=False, local=local)
