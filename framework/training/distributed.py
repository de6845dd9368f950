"""Starting the process group, and agreeing between ranks on small things over the CPU."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from framework.errors import PeerLost, TubeworksError
from framework.training.rendezvous import meet
from framework.world import World

__all__ = ["Peers", "choose_device", "peer_lost", "rank_variables", "start_process_group"]

log = logging.getLogger(__name__)

T = TypeVar("T")


def choose_device(world: World) -> torch.device:
    """The accelerator of this rank, or the CPU where there is none.

    One that is alone is taken by every rank: Slurm may show each task another one.

    Errors:
        TubeworksError: the node has more ranks than GPUs.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if 1 < count < world.local_size:
            raise TubeworksError(
                f"{world.local_size} ranks on this node see {count} GPUs, and no two can share one: start "
                f"{count} ranks on a node, or show them more (CUDA_VISIBLE_DEVICES, --gpus-per-node)"
            )
        device = torch.device("cuda", world.local_rank % count)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start_process_group(
    world: World, device: torch.device, seconds: float = 1800.0, run: Path | None = None
) -> Peers:
    """Start torch.distributed through DeepSpeed: nccl on GPUs, gloo on CPUs.

    A collective fails when it waits for `seconds`, or half an hour if that is longer.
    Tasks of a Slurm step meet in the run folder; otherwise MASTER_ADDR and MASTER_PORT must be in the
    environment when there may be several nodes.

    Errors:
        TubeworksError: ranks may be on several nodes, and nothing says where rank 0 is.
    """
    if run is not None:
        os.environ.update(meet(run, world, os.environ))
    if "MASTER_ADDR" not in os.environ and world.size > world.local_size:
        raise TubeworksError(
            f"{world.size} ranks do not know where rank 0 is: set MASTER_ADDR to its host and MASTER_PORT to "
            "a free port there, the same for all"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.update(rank_variables(world, device))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if world.size == 1 else "29500")
    # DeepSpeed calls what torch has renamed; its users cannot do anything about it, step after step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    with _not_imported("mlflow"):  # for its autotuner; the mirror is a process of its own
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Its shared-memory all-reduce is compiled at first use (a minute, and a C++ compiler), and a killed
        # run leaves its segments behind; gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=max(1800.0, seconds))
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        dist_init_required=None,
        verbose=False,
        timeout=limit,
    )
    # a group has a time limit of its own, whatever that of the others is
    group = dist.new_group(backend="gloo", timeout=limit) if backend != "gloo" else dist.group.WORLD
    return Peers(world, group)


def rank_variables(world: World, device: torch.device) -> dict[str, str]:
    """What DeepSpeed reads from the environment about a rank.

    It takes LOCAL_RANK for the index of the rank's GPU. Where Slurm shows each task its own GPU alone, that
    is 0 for all of them, whatever their number on the node is.
    """
    place = world.local_rank if device.index is None else device.index
    return {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(place)}


@contextmanager
def _not_imported(*names: str) -> Iterator[None]:
    """Make imports of these modules fail meanwhile, as if they were not installed.

    For what libraries import on the chance that somebody uses it, and what costs every rank seconds.
    """
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def peer_lost(error: RuntimeError) -> PeerLost | None:
    """What the failure of a collective means to the user; None for a failure of another kind."""
    text = str(error)
    # gloo has no exception class of its own, only its name in the text.
    if not isinstance(error, dist.DistError) and "gloo" not in text.lower():
        return None
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return PeerLost(f"lost contact to another rank, whose own output says why ({first[:200]})")


class Peers:
    """Agreement between ranks over a CPU group, so that it never waits for the device."""

    def __init__(self, world: World, group: Any) -> None:
        self.world = world
        self._group = group

    def collectives(self) -> int:
        """How many collectives this rank has entered so far, in all groups."""
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)

    def highest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks."""
        if self.world.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def exchange(self, values: Sequence[float]) -> list[list[float]]:
        """A few numbers of every rank, in the order of ranks, on every rank."""
        if self.world.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        shares = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(shares, mine, group=self._group)
        return [share.tolist() for share in shares]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in the order of ranks, on every rank."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def to_main(self, value: Any) -> list[Any] | None:
        """The value of every rank, in the order of ranks, on rank 0; None on the others."""
        if self.world.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world.size if self.world.is_main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def from_main(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        return self.gather(value)[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do something and give every rank its result, or its error."""
        result: T | None = None
        failure: TubeworksError | None = None
        if self.world.is_main:
            try:
                result = work()
            except TubeworksError as error:
                failure = error
        result, failure = self.from_main((result, failure))
        if failure is not None:
            raise failure
        return cast(T, result)

    def together(self, work: Callable[[], T]) -> T:
        """Let every rank do something; if one cannot, all leave with its error."""
        result: T | None = None
        failure: TubeworksError | None = None
        try:
            result = work()
        except TubeworksError as error:
            failure = error
        self.raise_first(failure)
        return cast(T, result)

    def raise_first(self, failure: TubeworksError | None) -> None:
        """Raise on every rank the error of the lowest rank that has one."""
        for rank, error in enumerate(self.gather(failure)):
            if error is not None:
                if rank > 0:
                    log.error("rank %d stopped the run", rank)
                raise error

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over all ranks, on the CPU in float64."""
        total = values.detach().to("cpu", torch.float64)
        if self.world.size > 1:
            dist.all_reduce(total, group=self._group)
        return total
