"""The whole model as ONNX: from bytes to logits."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from framework.errors import ModelError
from framework.exchange.run import FinishedRun

__all__ = ["write_onnx"]

NEEDED = ("onnx", "onnxscript")


class _OneSource(nn.Module):
    """A model with one tensor in and one out."""

    def __init__(self, model: nn.Module, source: str) -> None:
        super().__init__()
        self._model = model
        self._source = source

    def forward(self, pixels: Tensor) -> Tensor:
        return self._model({self._source: pixels})[self._source]


def write_onnx(run: FinishedRun, source: str, path: Path) -> None:
    """Write the model of a run for one source, for any number of samples.

    Errors:
        ModelError: the packages that it takes are not installed.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ModelError(f"--to onnx needs {' and '.join(missing)}: pip install 'tubeworks[onnx]'")
    spec = run.recipe.data.sources[source]
    pixels = torch.zeros(2, 3, spec.frames, spec.size, spec.size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            _OneSource(run.model(torch.device("cpu")), source).eval(),
            (pixels,),
            str(path),
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=4096)}},
            external_data=False,
            verbose=False,
        )
