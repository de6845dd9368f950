"""A submitted recipe means the same wherever its job starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from framework.errors import DataError, RecipeError
from framework.recipe import load_recipe
from framework.recipe.paths import with_absolute_paths
from launch.recipe_check import check_recipe
from launch.submission import Submission


def test_every_path_of_a_recipe_is_absolute(tmp_path: Path) -> None:
    changes = ["init={image: {run: runs/vit}}", "tracking.uri=sqlite:///runs/mlflow.db"]
    changes += ["data.sources.k400.path=shards/train", "data.sources.k400.validation=s3://bucket/val"]
    found = with_absolute_paths(load_recipe("vivit_b_m1_k400", changes).recipe, tmp_path)
    assert found.init is not None
    assert found.init.image is not None
    assert found.init.image.run == str(tmp_path / "runs/vit")
    assert found.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    source = found.data.sources["k400"]
    assert (source.path, source.validation) == (str(tmp_path / "shards/train"), "s3://bucket/val")
    assert with_absolute_paths(found, tmp_path / "elsewhere") == found


def test_a_run_that_it_starts_from_must_be_there(tmp_path: Path) -> None:
    origin, submission = tmp_path / "vit", Submission(str(tmp_path / "run"), "video")
    changes = [f"init={{image: {{run: {origin}}}}}", f"data.sources.k400.path={tmp_path}/none"]
    recipe = load_recipe("vivit_b_m1_k400", changes).recipe
    with pytest.raises(RecipeError, match=f"init: {origin} is neither a run nor a checkpoint"):
        check_recipe(recipe, submission)
    origin.mkdir()
    (origin / "recipe.yaml").touch()
    with pytest.raises(DataError, match="none"):
        check_recipe(recipe, submission)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pictures of ten classes."""
    from data_tools.synth import SynthOptions, synthesize

    folder = tmp_path_factory.mktemp("data") / "set"
    synthesize(SynthOptions(folder, frames=8, train_videos=2, val_videos=2, train_images=16, val_images=10))
    return folder / "train"


@pytest.fixture(scope="module")
def address(digits: Path) -> Iterator[str]:
    """The same from a store."""
    handler = partial(_Quiet, directory=str(digits))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nobody reads it."""


def check(folder: Path, shards: Path | str, *overrides: str, ranks: int = 1) -> dict[str, int]:
    """`check_recipe` for a job whose run folder is in `folder`."""
    recipe = folder / "job.yaml"
    recipe.write_text(
        "name: job\nmodel: {name: vit_ti}\n"
        f"data: {{sources: {{digits: {{path: '{shards}', kind: image, classes: 10, size: 32}}}}, "
        "mixture: {digits: 4}}\noptimizer: {lr: 1e-3}\ntrain: {steps: 10}\n"
    )
    submission = Submission(str(folder / "run"), "job", ranks_per_node=ranks)
    return check_recipe(load_recipe(str(recipe), overrides).recipe, submission)


def test_shards_that_do_not_fit_the_recipe_are_no_job(digits: Path, tmp_path: Path) -> None:
    """It would wait in the queue for nothing: training refuses such shards at its start."""
    assert check(tmp_path, digits) == {"digits": 16}
    with pytest.raises(DataError, match="has 10 classes, the recipe says 9"):
        check(tmp_path, digits, "data.sources.digits.classes=9")
    with pytest.raises(DataError, match="gone"):
        check(tmp_path, digits, f"data.sources.digits.validation={tmp_path}/gone")


def test_what_training_refuses_once_it_knows_the_samples(digits: Path, tmp_path: Path) -> None:
    assert check(tmp_path, digits, "schedule.warmup_epochs=2") == {"digits": 16}  # 8 of 10 steps
    with pytest.raises(RecipeError, match=r"3\.0 epochs of digits are 12 steps, and the training has 10"):
        check(tmp_path, digits, "schedule.warmup_epochs=3")
    assert check(tmp_path, digits, "data.sources.digits.mixup=0.2", ranks=2) == {"digits": 16}
    with pytest.raises(RecipeError, match="mixup needs an even number"):
        check(tmp_path, digits, "data.sources.digits.mixup=0.2", ranks=4)


def test_remote_shards_are_opened_through_the_recipes_cache(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache = f"data.cache.folder={tmp_path}/cache"
    assert check(tmp_path, address, cache) == {"digits": 16}
    assert [path for path in (tmp_path / "cache" / "tables").iterdir() if path.name != ".lock"]
    assert not (tmp_path / "home").exists()
    with pytest.raises(RecipeError, match=r"data\.cache\.gib=1e-06 is too small"):
        check(tmp_path, address, cache, "data.cache.gib=1e-6")
    no_room = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: no_room)
    assert check(tmp_path, address, cache) == {"digits": 16}, "the nodes have other disks"


def test_a_cache_on_a_disk_of_the_nodes_keeps_no_job_away(
    digits: Path,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "file").touch()
    cache = f"data.cache.folder={tmp_path}/file/cache"
    assert check(tmp_path, address, cache) == {"digits": 16}
    assert (tmp_path / "home" / "tubeworks" / "tables").is_dir()
    assert f"{tmp_path}/file/cache cannot be written on this machine (Not a directory)" in caplog.text
    caplog.clear()
    assert check(tmp_path, digits, cache) == {"digits": 16}
    assert caplog.text == "", "shards of a local folder need no cache"
