"""`tubeworks ckpt`: what is listed, what is found damaged, and what stays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import CheckpointError, RecipeError
from framework.files import hash_file
from framework.recipe import dump_yaml, load_recipe
from framework.training.checkpoint_manifest import folder_of, write_manifest
from framework.training.storage import TensorSpec, write_tensors
from launch.checkpoints import list_checkpoints, prune_checkpoints, show_checkpoint, verify_checkpoints


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with four committed checkpoints of one small file each."""
    run = tmp_path / "run"
    for step in (100, 200, 300, 400):
        folder = folder_of(run, step)
        folder.mkdir(parents=True)
        file = folder / "weight-00000.safetensors"
        file.write_bytes(bytes([step % 256]) * step)
        entry = {"name": file.name, "bytes": step, "blake2b": hash_file(file)}
        facts = {"step": step, "ranks": 2, "zero": 1, "precision": "fp32", "kinds": ["weight"]}
        write_manifest(folder, {**facts, "files": [entry]})
    (run / "recipe.yaml").write_text(dump_yaml(load_recipe("demo").recipe), encoding="utf-8")
    return run


def names(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def test_list_says_what_each_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list_checkpoints(run, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["bytes"], row["ranks"], row["zero"]) for row in rows] == [
        (100, 100, 2, 1),
        (200, 200, 2, 1),
        (300, 300, 2, 1),
        (400, 400, 2, 1),
    ]
    (folder_of(run, 200) / "MANIFEST.json").unlink()
    list_checkpoints(run, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "not a checkpoint" in lines[1]
    assert "2 ranks, zero 1, fp32, weight" in lines[2]


def test_verify_finds_a_flipped_byte_and_fails(run: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "ckpt", "verify", str(run)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    file = folder_of(run, 300) / "weight-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == CheckpointError.exit_code
    assert "step-00000300  weight-00000.safetensors does not match its hash" in answer.stdout
    assert "step-00000400  whole" in answer.stdout
    assert "Traceback" not in answer.stderr


def test_prune_keeps_the_newest_and_multiples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune_checkpoints(run, 1, 200)
    assert names(run) == ["step-00000200", "step-00000400"]
    assert capsys.readouterr().out == "removed step-00000100\nremoved step-00000300\n"
    prune_checkpoints(run, 1, 200)
    assert capsys.readouterr().out == "nothing to remove: 2 checkpoints kept\n"


def test_prune_follows_the_recipe(run: Path) -> None:
    kept = load_recipe("demo").recipe.checkpoint.keep
    prune_checkpoints(run, None, None)
    assert names(run) == [f"step-{step:08d}" for step in (100, 200, 300, 400)][-kept:]


def test_prune_never_removes_the_last_whole_one(run: Path) -> None:
    for step in (300, 400):
        (folder_of(run, step) / "weight-00000.safetensors").unlink()
    before = names(run)
    with pytest.raises(CheckpointError, match="step-00000200 is the newest that is whole"):
        prune_checkpoints(run, 2, 0)
    assert names(run) == before


def test_prune_says_what_stays_and_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {100: 0.2, 200: 0.9, 300: 0.5, 400: None}
    lines = [
        json.dumps({"step": step, "time": 0, "metrics": {"eval/k400/top_1": value}, "attempt": 0})
        for step, value in [(200, 0.1), *values.items(), (250, 1.0)]
    ]
    (run / "journal.jsonl").write_text("\n".join([*lines, '{"torn": "eval/k400/top_1']), encoding="utf-8")
    recipe = load_recipe("demo", ["checkpoint.best.metric=train/loss"]).recipe
    best = recipe.checkpoint.best
    assert best is not None
    settings = recipe.checkpoint.model_copy(
        update={"best": best.model_copy(update={"metric": "eval/k400/top_1"}), "keep": 1}
    )
    recipe = recipe.model_copy(update={"checkpoint": settings})
    (run / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    every = ["eval/k400/top_1", "train.eval_every"]
    with pytest.raises(RecipeError, match=every[0]):
        load_recipe(str(run / "recipe.yaml"))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("eval_every: 0", "eval_every: 100"), encoding="utf-8")
    every_100 = ["checkpoint.every=100"]
    resolved = load_recipe(str(run / "recipe.yaml"), every_100).recipe
    (run / "recipe.yaml").write_text(dump_yaml(resolved), encoding="utf-8")

    for dry_run in (True, False):
        prune_checkpoints(run, None, None, dry_run=dry_run, as_json=True)
        said = json.loads(capsys.readouterr().out)
        assert said["removed"] == ["step-00000100", "step-00000300"]
        assert said["kept"] == {"step-00000200": ["best eval/k400/top_1"], "step-00000400": ["newest"]}
        assert len(names(run)) == (4 if dry_run else 2)


def test_prune_beside_a_training_that_removes_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framework import files

    class Racing(files.Disk):
        def rename(self, source: Path, target: Path) -> None:
            shutil.rmtree(source)  # the training was faster
            super().rename(source, target)

    monkeypatch.setattr(files, "disk", Racing())
    (run / "checkpoints" / ".saving-step-00000500-abc").mkdir()
    prune_checkpoints(run, 1, 0)
    assert names(run) == [".saving-step-00000500-abc", "step-00000400"], "what is being written is left alone"


def test_show_says_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    folder = folder_of(run, 7)
    folder.mkdir(parents=True)
    fixed = [TensorSpec("blocks.0.scale", "F32", (3,), 12), TensorSpec("heads.k400.steps", "I64", (), 8)]
    fixed.sort(key=lambda spec: -spec.bytes)
    entry = write_tensors(folder / "fixed.safetensors", fixed, [bytes(20)])
    about = {"step": 7, "ranks": 2, "zero": 3, "precision": "bf16", "kinds": ["weight", "average", "exp_avg"]}
    shapes = {"blocks.0.attn.weight": [4, 2], "blocks.1.attn.weight": [4, 2], "norm.weight": [5]}
    attempts = [{"attempt": 0, "start_step": 0, "ranks": 4, "host": "c1", "started": "today"}]
    facts = {"files": [entry], "shapes": shapes, "fragments": [], "attempts": attempts, "mlflow_run": "ab12"}
    write_manifest(folder, {**about, **facts, "recipe": "r" * 8, "plan": "p" * 8})

    show_checkpoint(run, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["groups"] == {
        "blocks": {
            "tensors": 3,
            "bytes": 2 * 8 * 4 * 3 + 12,
            "what": "weight, average, exp_avg; frozen or buffer",
        },
        "heads.k400": {"tensors": 1, "bytes": 8, "what": "frozen or buffer"},
        "norm": {"tensors": 1, "bytes": 5 * 4 * 3, "what": "weight, average, exp_avg"},
    }
    assert (shown["step"], shown["ranks"], shown["zero"], shown["average"]) == (7, 2, 3, True)
    assert shown["attempts"] == attempts
    show_checkpoint(folder, as_json=False)
    text = capsys.readouterr().out
    assert "ab12" in text
    assert "from step 0, 4 ranks, on c1 since today" in text


def test_a_run_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    for command in (list_checkpoints, verify_checkpoints):
        with pytest.raises(CheckpointError, match="there are no checkpoints"):
            command(tmp_path, False)


def test_what_is_not_there_and_what_was_set_aside(run: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run folder nowhere"):
        list_checkpoints(Path("nowhere"), as_json=False)
    for step in (100, 200, 300, 400):
        folder_of(run, step).rename(run / "checkpoints" / f"damaged-step-{step:08d}")
    with pytest.raises(CheckpointError, match="set aside as damaged: damaged-step-00000100, damaged-step-0"):
        verify_checkpoints(run, as_json=False)
