"""The place of this process among its peers, read once at the edge and passed in."""

from __future__ import annotations

import os
from collections.abc import Mapping
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

        Errors:
            TubeworksError: the variables are there but make no sense.
        """
        env = os.environ if env is None else env
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
        ):
            if names[0] in env and names[1] in env and names[2] in env:
                try:
                    rank, size, local_rank = (int(env[name]) for name in names[:3])
                    local_size = int(env.get(names[3], "").split("(")[0] or 1)
                except ValueError as error:
                    raise TubeworksError(f"{', '.join(names)} must be integers: {error}") from error
                if not 0 <= rank < size:
                    raise TubeworksError(f"{names[0]}={rank} is not in [0, {names[1]}={size})")
                return cls(rank, size, local_rank, local_size)
        return None
