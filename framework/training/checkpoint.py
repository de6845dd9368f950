"""A checkpoint is a folder that its manifest commits; this module reads it and chooses between several.

A folder without a manifest that verifies is not a checkpoint. Since files hold named fragments (see
`framework.training.state`), any number of ranks and any ZeRO stage reads what any other wrote. They are
written by `framework.training.saver`.

    RUN/checkpoints/step-00000100/
        MANIFEST.json                files with sizes and hashes, fragments, step, plan, recipe, versions
        weight-00000.safetensors     the fp32 weights that rank 0 owns, by parameter name
        exp_avg-00000.safetensors    … each of the optimizer's moments, and `average`, in files of their own
        fixed.safetensors            frozen weights and buffers, written by rank 0
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from framework import files
from framework.errors import CheckpointError
from framework.training.checkpoint_manifest import (
    AVERAGE,
    FIXED,
    WEIGHT,
    checkpoint_folders,
    file_name,
    newest_valid,
    read_manifest,
    verify,
)
from framework.training.distributed import Peers
from framework.training.state import Fragment
from framework.training.storage import explain_os_error, write_text

__all__ = [
    "CheckpointReader",
    "checkpoint_folders",
    "choose_checkpoint",
    "load_weights",
    "newest_valid",
    "read_manifest",
    "verify",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A fragment as it lies in the files of a rank."""

    rank: int
    start: int
    count: int


class CheckpointReader:
    """Reads any range of any saved tensor, whatever number of ranks wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.step: int = self.manifest["step"]
        self.kinds: set[str] = set(self.manifest["kinds"])
        """What was saved of every trainable parameter: weight, average, and the optimizer's moments."""
        self._pieces: dict[str, list[Piece]] = {}
        for entry in self.manifest["fragments"]:
            self._pieces.setdefault(entry["name"], []).append(
                Piece(entry["rank"], entry["start"], entry["count"])
            )
        self._open: dict[str, Any] = {}

    def read(self, kind: str, fragment: Fragment) -> Tensor:
        """The values of a fragment, (count,) float32.

        Errors:
            CheckpointError: the parameter or a part of it is not in the checkpoint.
        """
        result = torch.empty(fragment.count)
        filled = 0
        for piece in self._pieces.get(fragment.name, []):
            low = max(piece.start, fragment.start)
            high = min(piece.start + piece.count, fragment.start + fragment.count)
            if low < high:
                stored = self._file(file_name(kind, piece.rank)).get_slice(fragment.name)
                result[low - fragment.start : high - fragment.start] = stored[
                    low - piece.start : high - piece.start
                ]
                filled += high - low
        if filled != fragment.count:
            raise CheckpointError(
                f"{self.folder} holds {filled} of {fragment.count} elements of {kind} {fragment.name} from "
                f"{fragment.start}: it belongs to another model"
            )
        return result

    def tensors(self, kind: str = WEIGHT, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Weights in full, one by one, float32, by their names in the model, and what is fixed."""
        for name in self._file(FIXED).keys():  # noqa: SIM118
            if name.startswith(prefix):
                yield name, self._file(FIXED).get_tensor(name)
        for name, shape in self.manifest["shapes"].items():
            if name.startswith(prefix):
                count = int(torch.Size(shape).numel())
                yield name, self.read(kind, Fragment(name, 0, count, 0)).view(shape)

    def weights(self, kind: str = WEIGHT) -> dict[str, Tensor]:
        """All weights in full, float32, by their names in the model; frozen weights and buffers included."""
        return dict(self.tensors(kind))

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Fill a model with the weights, one tensor at a time, so that they are in memory once.

        Errors:
            CheckpointError: names or shapes differ; the message says which.
        """
        targets = model.state_dict()
        saved = {*self.manifest["shapes"], *self._file(FIXED).keys()}
        if different := sorted(targets.keys() ^ saved):
            raise CheckpointError(f"{self.folder} is of another model: {', '.join(different)} not in both")
        for name, tensor in self.tensors():
            if targets[name].shape != tensor.shape:
                shapes = f"{list(tensor.shape)} instead of {list(targets[name].shape)}"
                raise CheckpointError(f"{self.folder} is of another model: {name} has the shape {shapes}")
            targets[name].copy_(tensor)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {self.folder / name}: {error}") from error
        return self._open[name]


def choose_checkpoint(run: Path, peers: Peers) -> Path | None:
    """The checkpoint to go on from, or None: rank 0 verifies and decides, all ranks get its answer.

    Damaged checkpoints are set aside as `damaged-step-…` with the reason inside, never deleted.

    Errors:
        CheckpointError: there are checkpoints, and all are damaged: training from scratch must be asked for.
    """
    return peers.on_main(lambda: _newest_whole(run))


def _newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that verifies; newer ones are set aside."""
    damaged = []
    for folder in reversed(checkpoint_folders(run)):
        problems = verify(folder)
        if not problems:
            return folder
        damaged.append(_set_aside(folder, problems))
    damaged += [folder.name for folder in (run / "checkpoints").glob("damaged-step-*") if not damaged]
    if damaged:
        raise CheckpointError(
            f"every checkpoint of {run} is damaged; they were set aside as {', '.join(sorted(damaged))} with "
            "the reasons in REASON.txt. Restore one, or start again in a new --run folder"
        )
    if _has_saved(run):
        raise CheckpointError(
            f"{run} has saved checkpoints (see events.jsonl), but {run / 'checkpoints'} holds none: is "
            "everything mounted? Restore them, or start again in a new --run folder"
        )
    return None


def _has_saved(run: Path) -> bool:
    """Whether the run folder tells of a checkpoint, wherever it is now."""
    path = run / "events.jsonl"
    with explain_os_error(path):
        return path.is_file() and b'"kind": "checkpoint"' in path.read_bytes()


def _set_aside(folder: Path, problems: Iterable[str]) -> str:
    text = "; ".join(problems)
    target = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    with explain_os_error(target):
        files.disk.rename(folder, target)
        files.sync_folder(target.parent)
    write_text(target / "REASON.txt", text + "\n")
    log.warning("checkpoint %s does not verify (%s): set aside as %s", folder.name, text, target.name)
    return target.name


def load_weights(checkpoint: Path, ema: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint in full (float32), or their moving average.

    Errors:
        CheckpointError: it is no checkpoint, or it keeps no moving average.
    """
    reader = CheckpointReader(checkpoint)
    if ema and AVERAGE not in reader.kinds:
        raise CheckpointError(
            f"{checkpoint} holds no moving average: the run had no train.ema_decay. Use --weights raw"
        )
    return reader.weights(AVERAGE if ema else WEIGHT)
