"""GPUs and what they can do: from their data sheets, or as measured by `benchmarks.train_step`."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import RecipeError

__all__ = ["ASSUMED_SHARE", "HARDWARE", "Hardware", "Measured", "find_hardware"]

ASSUMED_SHARE = 0.4
"""Share of the matrix rate that a training step is assumed to reach where none was measured."""


@dataclass(frozen=True)
class Measured:
    """One measured training step: a model's width and depth, tokens of a sample, share of the matrix rate."""

    width: int
    depth: int
    tokens: int
    share: float


@dataclass(frozen=True)
class Hardware:
    """One GPU and its surroundings; rates per GPU and direction."""

    name: str
    matmul: float
    """Dense bf16 operations a second, a multiply-add counted as two."""
    memory: int
    """Bytes."""
    host_link: float
    """Bytes a second from host memory."""
    gpu_link: float
    """Bytes a second to the other GPUs of the node."""
    network: float
    """Bytes a second to other nodes."""
    source: str
    measured: tuple[Measured, ...] = ()

    def share(self, width: int, depth: int, tokens: int) -> tuple[float, str]:
        """The share of `matmul` that a step reaches, and where the number comes from.

        Of measured steps, that of the nearest size counts, and among equals of the nearest token count.
        """
        if not self.measured:
            return ASSUMED_SHARE, "assumed"

        def distance(row: Measured) -> tuple[float, int]:
            size, wanted = row.depth * row.width**2, depth * width**2
            return max(size / wanted, wanted / size), abs(row.tokens - tokens)

        nearest = min(self.measured, key=distance)
        label = f"measured with width {nearest.width}, depth {nearest.depth}, {nearest.tokens} tokens"
        return nearest.share, label


HARDWARE = {
    "a100": Hardware(
        "A100 SXM 80 GB",
        312e12,
        80 * 10**9,
        32e9,
        300e9,
        25e9,
        "NVIDIA's data sheets of A100 and DGX A100",
    ),
    "h100": Hardware(
        "H100 SXM", 989e12, 80 * 10**9, 64e9, 450e9, 50e9, "NVIDIA's data sheets of H100 and DGX H100"
    ),
    "h200": Hardware(
        "H200 SXM", 989e12, 141 * 10**9, 64e9, 450e9, 50e9, "NVIDIA's data sheets of H200 and DGX H200"
    ),
}
"""By name. Links are half of what the data sheets give for both directions together."""


def find_hardware(name: str) -> Hardware:
    """The GPU of a name, or the one that a results file of `benchmarks.train_step` was measured on.

    Errors:
        RecipeError: no such name or file, or a file of another kind.
    """
    if name.lower() in HARDWARE:
        return HARDWARE[name.lower()]
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name.lower(), HARDWARE, n=1, cutoff=0.0)[0]
        raise RecipeError(
            f"--hardware: `{name}` is neither a GPU that is known ({', '.join(HARDWARE)}; did you mean "
            f"`{near}`?) nor a results file of `make bench-gpu`"
        )
    try:
        return _from_results(json.loads(path.read_text(encoding="utf-8")), path)
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path}: this is no results file of `make bench-gpu` ({type(error).__name__}: {error})"
        ) from error


def _from_results(results: dict[str, Any], path: Path) -> Hardware:
    device = results["device"]
    rows = tuple(
        Measured(row["width"], row["depth"], row["tokens"], row["share"])
        for row in results["steps"]
        if row["kind"] == "step" and not row.get("failed")
    )
    # What the benchmark does not measure is that of the data sheet of the same chip.
    known = next((gpu for key, gpu in HARDWARE.items() if key in device["name"].lower()), HARDWARE["h100"])
    return Hardware(
        device["name"],
        results["ceiling"]["flops_per_s"],
        device["memory"],
        known.host_link,
        known.gpu_link,
        known.network,
        f"{path.name} (matrix rate, shares of it, memory); links: {known.source}",
        rows,
    )
