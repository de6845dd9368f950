"""What the model of a run, or of an export, sees in videos and images.

from framework.exchange.predict import Predictor
predictor = Predictor("runs/mine")
print(predictor("clip.mp4").best)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.data.samples import ViewReader
from framework.errors import ModelError
from framework.exchange.media import OneFile, describe_file
from framework.exchange.run import Weights, check_classifies, open_trained
from framework.recipe.schema import Evaluation, Source
from framework.training.distributed import choose_device
from framework.world import World

__all__ = ["Answer", "Prediction", "Predictor"]


KINDS = {"image": "an image", "video": "a video"}


@dataclass(frozen=True)
class Answer:
    """One class and its probability; `head` is empty where the source has only one."""

    label: str
    probability: float
    head: str = ""


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of a file, the likeliest first, head by head."""

    file: str
    source: str
    kind: str
    views: int
    device: str
    answers: tuple[Answer, ...]

    @property
    def best(self) -> str:
        """The likeliest class (of the first head)."""
        return self.answers[0].label

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class Predictor:
    """A run's newest checkpoint, or an export, ready for single files."""

    def __init__(
        self,
        run: str | Path,
        *,
        source: str | None = None,
        weights: Weights | None = None,
        views: tuple[int, int] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Load the model.

        Args:
            run: the folder of the run, or one that `tubeworks export` wrote.
            source: whose classifier and clips; by default the only source of the file's kind.
            weights: averaged ones by default, where there are any; of an export those that are there.
            views: temporal and spatial; by default those of the recipe's evaluation.
            device: by default a GPU where there is one.

        Errors:
            TubeworksError: no run, no valid checkpoint, an export for another library, no such source, no
                such device.
        """
        self._run = open_trained(Path(run), weights)
        check_classifies(self._run.folder, self._run.recipe)
        self._device = choose_device(World()) if device is None else _usable(device)
        self._model = self._run.model(self._device)
        settings: Evaluation = self._run.recipe.evaluation
        self._views = views or (settings.temporal_views, settings.spatial_views)
        if source is not None:
            self._run.source(source)
        self._source = source

    def __call__(self, file: str | Path, top: int = 5) -> Prediction:
        """Classify a video or an image; logits are averaged over the views, as in evaluation.

        Errors:
            DataError: a file that does not decode.
            ModelError: no source of the file's kind, or several and none was named.
        """
        path = Path(file)
        info = describe_file(path)
        name, source = self._source_for(info.kind, path)
        reader = ViewReader(source, OneFile(path, name))
        pixels = torch.from_numpy(reader.evaluation_views(info, *self._views))  # (views, frames, h, w, 3)
        logits = [self._logits(name, view) for view in pixels]
        answers = _answers(torch.stack(logits).mean(dim=0), source, self._run.classes(name), top)
        return Prediction(str(path), name, info.kind, len(pixels), str(self._device), answers)

    @torch.no_grad()
    def _logits(self, name: str, view: Tensor) -> Tensor:
        clip = view.permute(3, 0, 1, 2).unsqueeze(0).to(self._device)
        return self._model({name: clip})[name][0].float().cpu()

    def _source_for(self, kind: str, path: Path) -> tuple[str, Source]:
        sources = self._run.recipe.data.sources
        fitting = [name for name, source in sources.items() if source.kind == kind]
        if self._source is not None:
            if self._source not in fitting:
                raise ModelError(
                    f"{path}: is {KINDS[kind]}, and the source {self._source} reads "
                    f"{sources[self._source].kind}s"
                )
            return self._source, sources[self._source]
        if len(fitting) != 1:
            found = f"several ({', '.join(fitting)}): name one with --source" if fitting else "none"
            raise ModelError(f"{path}: sources of the run that read {kind}s: {found}")
        return fitting[0], sources[fitting[0]]


def _usable(device: str | torch.device) -> torch.device:
    """The device, after a first use of it."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ModelError(f"--device {device}: cannot be used here ({reason}); cpu always can") from error


def _answers(logits: Tensor, source: Source, classes: Sequence[str], top: int) -> tuple[Answer, ...]:
    """The likeliest classes: softmax of each head, or the sigmoid of each class where several may apply."""
    targets = source.targets
    answers: list[Answer] = []
    first = 0
    for position, size in enumerate(targets.sizes):
        part, names = logits[first : first + size], list(classes[first : first + size])
        first += size
        chances = part.sigmoid() if targets.kind == "multi" else part.softmax(dim=0)
        values, places = chances.topk(min(top, size))
        head = targets.names[position] if targets.names else ""
        pairs = zip(values.tolist(), places.tolist(), strict=True)
        answers += [Answer(names[place], value, head) for value, place in pairs]
    return tuple(answers)
