"""One file of all weights, whoever wrote the checkpoint, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from framework.errors import CheckpointError
from framework.training.checkpoint import load_weights, newest_valid
from framework.training.checkpoint_manifest import folder_of, write_manifest
from framework.training.consolidate import consolidate
from framework.training.storage import TensorSpec, write_tensors


@pytest.mark.parametrize("ema", [False, True])
def test_it_holds_what_the_ranks_hold(trained: Path, tmp_path: Path, ema: bool) -> None:
    entry = consolidate(newest_valid(trained), tmp_path / "all.safetensors", ema)
    ours, theirs = load_file(tmp_path / "all.safetensors"), load_weights(newest_valid(trained), ema)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    assert entry["bytes"] == (tmp_path / "all.safetensors").stat().st_size
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        about = file.metadata()
    assert about["step"] == "6"
    assert about["weights"] == ("average" if ema else "weight")


def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(run_copy: Path, tmp_path: Path) -> None:
    path = folder_of(run_copy, 6) / "weight-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not whole: weight-00001"):
        consolidate(folder_of(run_copy, 6), tmp_path / "out" / "all.safetensors")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="is not overwritten"):
        consolidate(folder_of(run_copy, 3), tmp_path / "taken")
    with pytest.raises(CheckpointError, match="No such file"):
        consolidate(folder_of(run_copy, 3), tmp_path / "nowhere" / "all.safetensors")
    assert [path.name for path in tmp_path.glob("*") if path.name not in ("run", "taken")] == []


def big_checkpoint(run: Path, megabytes: int) -> Path:
    """Four tensors, each cut in the middle between two ranks."""
    folder = folder_of(run, 1)
    folder.mkdir(parents=True)
    names, count = [f"blocks.{number}.weight" for number in range(4)], megabytes * 2**18
    entries, block = [], bytes(2**20)
    for rank in (0, 1):
        specs = [TensorSpec(name, "F32", (count // 2,), count * 2) for name in names]
        blocks = (block for _ in range(len(names) * megabytes // 2))
        entries.append(write_tensors(folder / f"weight-0000{rank}.safetensors", specs, blocks))
    entries.append(write_tensors(folder / "fixed.safetensors", [], []))
    pieces = [
        {"name": name, "start": rank * count // 2, "count": count // 2, "rank": rank}
        for name in names
        for rank in (0, 1)
    ]
    about = {"step": 1, "kinds": ["weight"], "shapes": {name: [count] for name in names}}
    write_manifest(folder, {**about, "files": entries, "fragments": pieces})
    return folder


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (2, 64):
        folder = big_checkpoint(tmp_path / str(megabytes), megabytes)
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from framework.training.consolidate import consolidate\n"
            "consolidate(Path(sys.argv[1]), Path(sys.argv[2]))\n"
            "assert 'torch' not in sys.modules\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / f"{megabytes}.safetensors")]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout) / 1024)
    assert (tmp_path / "64.safetensors").stat().st_size > 256 * 2**20
    assert peaks[1] - peaks[0] < 1.2 * 64, f"{peaks} MiB, with tensors of 64 MiB"


def test_the_command_takes_a_run(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "ckpt", "consolidate", str(trained)]
    to = ["--to", str(tmp_path / "all.safetensors"), "--ema", "--json"]
    done = subprocess.run([*command, *to], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["checkpoint"].endswith("step-00000006")
    assert facts["weights"] == "average"
    assert facts["bytes"] == (tmp_path / "all.safetensors").stat().st_size
