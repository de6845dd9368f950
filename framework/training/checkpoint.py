"""A checkpoint is a folder that its manifest commits.

Each rank writes the fragments that it owns as safetensors, syncs and hashes them; rank 0 writes
`MANIFEST.json` and renames the folder. A folder without a manifest that verifies is not a checkpoint. Since
files hold named fragments (see `framework.training.state`), any number of ranks and any ZeRO stage reads
what any other wrote.

    RUN/checkpoints/step-00000100/
        MANIFEST.json                files with sizes and hashes, fragments, step, plan, recipe hash, versions
        weight-00000.safetensors     the fp32 weights that rank 0 owns, by parameter name
        exp_avg-00000.safetensors    … each of the optimizer's moments, and `average`, in files of their own
        fixed.safetensors            frozen weights and buffers, written by rank 0
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from framework.errors import CheckpointError
from framework.files import sync_folder
from framework.training.checkpoint_manifest import (
    checkpoint_folders,
    folder_of,
    read_manifest,
    verify,
    write_manifest,
)
from framework.training.distributed import Peers
from framework.training.state import AVERAGE, WEIGHT, Fragment, TrainState
from framework.training.storage import FileEntry, explain_os_error, write_file

__all__ = [
    "CheckpointReader",
    "checkpoint_folders",
    "choose_checkpoint",
    "load_weights",
    "newest_valid",
    "prune",
    "read_manifest",
    "save_checkpoint",
    "verify",
]

log = logging.getLogger(__name__)

FIXED = "fixed.safetensors"


# --- writing ---------------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path, step: int, model: nn.Module, state: TrainState, peers: Peers, facts: Mapping[str, Any]
) -> Path:
    """Write and commit the checkpoint of a step, all ranks together.

    Args:
        run: the run folder.
        step: how many steps are done.
        model: for frozen weights and buffers.
        state: the trainable state that this rank owns.
        peers: the other ranks.
        facts: what else the manifest records (plan hash, recipe hash, …).

    Errors:
        CheckpointError: on every rank, if any rank could not write; earlier checkpoints are untouched.
    """
    final = folder_of(run, step)
    temporary = final.with_name(f".saving-{final.name}")
    try:
        _agree(peers, _attempt(lambda: _fresh_folder(temporary)) if peers.world.is_main else None)
        files: list[FileEntry] = []
        fragments: list[dict[str, Any]] = []
        fixed = _fixed_tensors(model, peers.world.is_main)  # together, so before a rank can fail to write
        _agree(peers, _attempt(lambda: _write_share(temporary, model, state, peers, fixed, files, fragments)))
        gathered = peers.gather((files, fragments))
        manifest = {
            "step": step,
            "optimizer_steps": state.optimizer_steps(),
            "ranks": peers.world.size,
            "kinds": state.kinds,
            **facts,
            "files": [entry for share, _ in gathered for entry in share],
            "shapes": {name: list(_full_shape(p)) for name, p in model.named_parameters() if p.requires_grad},
            "fragments": [entry for _, share in gathered for entry in share],
        }
        _agree(peers, _attempt(lambda: _commit(temporary, final, manifest)) if peers.world.is_main else None)
    except CheckpointError:
        if peers.world.is_main:  # give back the space: on a full disk the journal needs it
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_manifest(temporary, manifest)
    with explain_os_error(final):
        if final.exists():  # the same step, saved by an attempt that did not get further
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(final.parent)


def prune(run: Path, keep: int, keep_every: int) -> list[Path]:
    """Remove all but the newest `keep` and those at multiples of `keep_every`; returns what was removed.

    Errors:
        CheckpointError: a folder cannot be renamed.
    """
    removed = []
    for folder in checkpoint_folders(run)[:-keep]:
        step = int(folder.name.removeprefix("step-"))
        if keep_every and step % keep_every == 0:
            continue
        # Renamed first: from then on it is no checkpoint, whatever happens.
        doomed = folder.with_name(f".removing-{folder.name}")
        with explain_os_error(folder):
            folder.rename(doomed)
        # On NFS a file that an evaluation reads keeps its folder; the next checkpoint tries again.
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(folder)
    return removed


def _write_share(
    folder: Path,
    model: nn.Module,
    state: TrainState,
    peers: Peers,
    fixed: dict[str, Tensor],
    files: list[FileEntry],
    fragments: list[dict[str, Any]],
) -> None:
    """Write what this rank owns, one file a kind; without ZeRO all own all and share the work."""
    rank, size = peers.world.rank, peers.world.size
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    for kind in state.kinds:
        # Clones, and only of one kind at a time: a view would drag its whole flat tensor along.
        tensors: dict[str, Tensor] = {}
        for fragment, tensor in state.tensors(kind):
            if state.replicated and order[fragment.name] % size != rank:
                continue
            tensors[fragment.name] = tensor.to("cpu", copy=True)
            if kind == WEIGHT:
                fragments.append(
                    {"name": fragment.name, "start": fragment.start, "count": fragment.count, "rank": rank}
                )
        files.append(_write_tensors(folder / _file_name(kind, rank), tensors))
    if rank == 0:
        files.append(_write_tensors(folder / FIXED, fixed))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    return write_file(path, lambda target: save_file(tensors, target))


def _file_name(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def _fixed_tensors(model: nn.Module, wanted: bool) -> dict[str, Tensor]:
    """Frozen weights and persistent buffers: what no optimizer holds and a loader must not lose.

    All ranks together; only those that have it `wanted` get copies on the CPU.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    fixed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in trainable:
            with _whole(tensor):
                if wanted:
                    fixed[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return fixed


def _whole(tensor: Tensor) -> AbstractContextManager[Any]:
    """A while in which all ranks have all of a weight: ZeRO-3 cuts frozen ones into pieces, too."""
    if getattr(tensor, "ds_numel", tensor.numel()) == tensor.numel():
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([tensor])


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _fresh_folder(folder: Path) -> None:
    with explain_os_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for pattern in (".saving-*", ".removing-*"):  # of attempts that were killed meanwhile
            for leftover in folder.parent.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir()


def _attempt(work: Callable[[], None]) -> str | None:
    """Do it; a failure to write becomes a value, so that the ranks can agree on it instead of hanging."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def _agree(peers: Peers, failure: str | None) -> None:
    failures = [(rank, text) for rank, text in enumerate(peers.gather(failure)) if text is not None]
    if failures:
        rank, text = failures[0]
        raise CheckpointError(
            f"the checkpoint was not written, earlier ones are untouched. Rank {rank}: {text}"
        )


# --- reading ---------------------------------------------------------------------------------------------


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
                stored = self._file(_file_name(kind, piece.rank)).get_slice(fragment.name)
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


def newest_valid(run: Path) -> Path:
    """The newest checkpoint of a run that verifies; changes nothing.

    Errors:
        CheckpointError: there is none.
    """
    reasons = []
    for folder in reversed(checkpoint_folders(run)):
        problems = verify(folder)
        if not problems:
            return folder
        reasons.append(f"{folder.name}: {'; '.join(problems)}")
    detail = f" ({' | '.join(reasons)})" if reasons else ""
    raise CheckpointError(
        f"no valid checkpoint in {run / 'checkpoints'}{detail}. Train first, or name another run"
    )


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
    return None


def _set_aside(folder: Path, problems: Iterable[str]) -> str:
    text = "; ".join(problems)
    target = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    with explain_os_error(target):
        folder.rename(target)
        (target / "REASON.txt").write_text(text + "\n", encoding="utf-8")
        sync_folder(target.parent)
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
