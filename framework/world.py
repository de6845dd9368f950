"""The place of this process among its peers, read once at the edge and passed in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from framework.errors import TubeworksError

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """Rank and size of the job, and of its part on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that decides, commits and reports."""
        return self.rank == 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> World | None:
        """The world that torchrun, `tubeworks --ranks` or srun describe in the environment; None without one.

        The batch script of a Slurm job is no rank, although Slurm tells it a rank and a number of tasks, and
        neither is a step of one task: an interactive shell, or one task that starts a rank per GPU.

        Errors:
            TubeworksError: the variables are there but make no sense.
        """
        env = os.environ if env is None else env
        torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if all(name in env for name in torchrun[:3]):
            return cls._checked(torchrun, [env.get(name, "1") for name in torchrun])
        srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        if "SLURM_STEP_ID" in env and all(name in env for name in srun[:3]) and env[srun[1]] != "1":
            values = [env[name] for name in srun[:3]]
            return cls._checked(
                srun, [*values, _tasks_of_node(env.get(srun[3], "1"), env.get("SLURM_NODEID", "0"))]
            )
        return None

    @classmethod
    def _checked(cls, names: Sequence[str], values: Sequence[str]) -> World:
        try:
            rank, size, local_rank, local_size = map(int, values)
        except ValueError as error:
            raise TubeworksError(f"{', '.join(names)} must be integers: {error}") from error
        if not 0 <= rank < size:
            raise TubeworksError(f"{names[0]}={rank} is not in [0, {names[1]}={size})")
        return cls(rank, size, local_rank, local_size)


def _tasks_of_node(tasks: str, node: str) -> str:
    """The tasks on node number `node` in Slurm's short form: `4(x2),1` is four on each of two and one."""
    counts: list[str] = []
    for part in tasks.split(","):
        count, _, repeated = part.partition("(x")
        counts += [count] * (int(repeated.rstrip(")")) if repeated.rstrip(")").isdigit() else 1)
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else counts[0]
