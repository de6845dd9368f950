"""Pictures of what a model predicts for the first held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from framework.data.labels import chosen_classes, guessed_classes, label_text
from framework.tracking.pictures import SAMPLES, Tile, contact_sheet, spread_frames

if TYPE_CHECKING:
    from torch import Tensor

    from framework.data.loader import EvalBatch
    from framework.data.sources import OpenSource

__all__ = ["Predictions"]


class Predictions:
    """Keeps the first samples that pass by (an `Observer` of `evaluate`) and draws them afterwards."""

    def __init__(self, sources: Mapping[str, OpenSource], samples: int = SAMPLES) -> None:
        self._sources = sources
        self._samples = samples
        self._tiles: dict[str, list[Tile]] = {}

    def __call__(self, name: str, batch: EvalBatch, logits: Tensor) -> None:
        """Keep samples of a batch until there are enough; the middle view is the one that is pictured."""
        tiles = self._tiles.setdefault(name, [])
        if len(tiles) >= self._samples:  # asking an accelerator for predictions would wait for it
            return
        opened = self._sources[name]
        targets, averaged = opened.source.targets, logits.mean(dim=1).cpu()
        views = batch.pixels.shape[1]
        middle = views // 3 // 2 * 3 + 1 if views % 3 == 0 else views // 2  # the centre of three crops
        for row in batch.valid.nonzero().flatten().tolist():
            if len(tiles) >= self._samples:
                return
            frames = spread_frames(batch.pixels[row, middle].numpy())
            true = chosen_classes(targets, batch.labels[row])
            guess = guessed_classes(targets, averaged[row], len(true))
            tiles.append(Tile(frames, label_text(opened.dataset, true), label_text(opened.dataset, guess)))

    def draw(self, folder: Path, caption: str, suffix: str = "") -> list[Path]:
        """Write `predictions-<source><suffix>.png` for every source that had samples; returns the paths.

        Errors:
            OSError: a picture cannot be written.
        """
        return [
            contact_sheet(tiles, folder / f"predictions-{name}{suffix}.png", f"{name}: {caption}")
            for name, tiles in self._tiles.items()
            if tiles
        ]
