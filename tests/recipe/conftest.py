"""Recipe files to compose and break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = """\
name: small
model: {name: tubevit_ti}
data:
  sources:
    motion:
      path: shards/train
      kind: video
      classes: 8
      clip: {frames: 16, stride: 1}
    digits:
      path: shards/train
      kind: image
      classes: 10
  mixture: {motion: 8, digits: 16}
optimizer:
  lr: 1e-3
train:
  steps: 100
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write files into the working directory; returns the name of the last one."""
    monkeypatch.chdir(tmp_path)

    def write_files(**files: str) -> str:
        for name, text in files.items():
            Path(f"{name}.yaml").write_text(text, encoding="utf-8")
        return f"{list(files)[-1]}.yaml"

    return write_files


@pytest.fixture
def good(write: Callable[..., str]) -> str:
    """A recipe without errors."""
    return write(good=GOOD)
