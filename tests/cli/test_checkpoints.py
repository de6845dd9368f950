"""`tubeworks ckpt`: what is listed, what is found damaged, and what stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import CheckpointError
from framework.files import hash_file
from framework.recipe import dump_yaml, load_recipe
from framework.training.checkpoint_manifest import folder_of, write_manifest
from launch.checkpoints import list_checkpoints, prune_checkpoints, verify_checkpoints


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


def test_prune_keeps_the_newest_and_multiples(run: Path) -> None:
    prune_checkpoints(run, 1, 200)
    assert names(run) == ["step-00000200", "step-00000400"]


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
