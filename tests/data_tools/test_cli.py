"""The command line answers at once and passes on what the modules say."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework.data.manifest import Manifest

HEAVY = ("torch", "deepspeed", "mlflow", "pydantic", "numpy", "av", "pyarrow", "PIL", "sklearn", "webdataset")
RECIPE = """
name: listing
model: {{name: tubevit_ti}}
data:
  sources:
    motion: {{path: {path}, kind: video, classes: 8, size: 16, clip: {{frames: 2, stride: 1}}}}
    digits: {{path: {path}, kind: image, classes: 10, size: 16}}
  mixture: {{motion: 4, digits: 8}}
optimizer: {{lr: 0.001}}
train: {{steps: 10}}
"""


def test_importing_the_commands_imports_nothing_heavy() -> None:
    code = f"import sys, data_tools.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_samples_of_a_step_are_listed_by_key(tubeworks: Callable[..., Any], tmp_path: Path) -> None:
    counts = ("--train-videos", 16, "--val-videos", 8, "--train-images", 16, "--val-images", 8)
    assert tubeworks("synth", "--out", tmp_path / "set", *counts, "--size", 16, "--frames", 2).code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(path=tmp_path / "set" / "train"))

    def keys(world: int, rank: int) -> dict[str, list[str]]:
        done = tubeworks("plan", recipe, "--step", 3, "--world", world, "--rank", rank, "--json")
        assert done.code == 0, done.stderr
        [micro] = done.json["micro_batches"]
        return {name: [row["key"] for row in rows] for name, rows in micro.items()}

    whole, parts = keys(1, 0), [keys(2, rank) for rank in range(2)]
    assert {name: len(rows) for name, rows in whole.items()} == {"motion": 4, "digits": 8}
    assert whole == {name: parts[0][name] + parts[1][name] for name in whole}
    known = set(Manifest.open(tmp_path / "set" / "train").column("key"))
    assert {key for rows in whole.values() for key in rows} <= known
    text = tubeworks("plan", recipe, "--step", 3).stdout
    assert all(key in text for rows in whole.values() for key in rows)
    done = tubeworks("plan", recipe, "data.mixture.motoin=3")
    assert (done.code, "motoin" in done.stderr) == (2, True)


def test_a_terminal_gets_a_progress_bar_and_a_pipe_none(
    class_folders: Callable[..., Path], make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    root = class_folders({f"cat/{i}.jpg": make_image(seed=i) for i in range(20)})
    command = [sys.executable, "-m", "launch.cli", "data", "shard", "folder", "--input", str(root), "--json"]
    command += ["--workers", "1", "--out"]
    piped = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    shown = subprocess.run(
        [*command, str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=child, env=environment, check=True
    )
    os.close(child)
    screen = os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert "sharding" in screen
    assert "20/20" in screen
    assert shown.stdout.decode() == piped.stdout, "the report stays the same"
