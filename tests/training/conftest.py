"""One tiny data set and recipe, and ranks that start fast: real processes, real DeepSpeed, gloo on the CPU.

Importing torch and DeepSpeed takes longer than a tiny training, so a server imports them once and every rank
is forked from it (multiprocessing's forkserver). A rank is a process of its own all the same: it can be
killed, it runs the command line, and it has its own environment and log.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the ranks import `rank_processes` by its name

from data_tools.synth import SynthOptions, synthesize
from framework.recipe import load_recipe
from framework.recipe.schema import Recipe

RECIPE = """\
name: tiny
seed: 3
model:
  name: tubevit_ti
  width: 64
  depth: 2
  heads: 2
  mlp_width: 128
  tubes:
    - {{kernel: [2, 8, 8], stride: [2, 8, 8]}}
    - {{kernel: [1, 8, 8], stride: [4, 8, 8]}}
  stochastic_depth: 0.3
data:
  sources:
    motion:
      path: {shards}/train
      kind: video
      classes: 8
      size: 16
      clip: {{frames: 4, stride: 1}}
      label_smoothing: 0.1
    digits:
      path: {shards}/train
      kind: image
      classes: 10
      size: 16
      mixup: 0.2
  mixture: {{motion: 8, digits: 8}}
  block: 16
  workers: 0
optimizer: {{lr: 1e-3, weight_decay: 0.05}}
train: {{steps: 6, log_every: 1, ema_decay: 0.9}}
schedule: {{warmup: 2}}
engine: {{zero: 1, precision: fp32, bucket_mb: 1}}
checkpoint: {{every: 3, keep: 10}}
tracking: {{mlflow: false}}
"""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen clips and as many pictures, and some held out."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    counts = {"train_videos": 24, "val_videos": 8, "train_images": 24, "val_images": 10}
    synthesize(SynthOptions(folder, size=16, frames=6, **counts))
    return folder


@pytest.fixture(scope="session")
def recipe_file(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe over these shards."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE.format(shards=shards))
    return path


@pytest.fixture(scope="session")
def make_recipe(recipe_file: Path) -> Callable[..., Recipe]:
    """The tiny recipe as an object, with overrides."""
    return lambda *overrides: load_recipe(str(recipe_file), overrides).recipe


@pytest.fixture(scope="session")
def trained(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe on two ranks: 6 steps, checkpoints after 3 and 6. Not to be changed."""
    from rank_processes import train_to_end

    return train_to_end(recipe_file, tmp_path_factory.mktemp("trained") / "run", 2)


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run to damage or to go on with."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
