"""Who is a rank: torchrun's variables, srun's tasks, and what only looks like one."""

from __future__ import annotations

import pytest

from framework.errors import TubeworksError
from framework.world import World

BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2"}
TASK = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_tasks_of_a_step() -> None:
    assert World.from_env(TASK) == World(3, 4, 1, 2)
    uneven = {
        **TASK,
        "SLURM_STEP_NUM_TASKS": "9",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
        "SLURM_NODEID": "2",
    }
    assert World.from_env({**uneven, "SLURM_PROCID": "8", "SLURM_LOCALID": "0"}) == World(8, 9, 0, 1)


def test_a_batch_script_is_no_rank() -> None:
    assert World.from_env(BATCH) is None


def test_a_step_of_one_task_starts_ranks_itself() -> None:
    assert World.from_env({**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_inside_a_job_counts() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert World.from_env({**BATCH, **torchrun}) == World(1, 8, 1, 8)


@pytest.mark.parametrize("changes", [{"SLURM_PROCID": "4"}, {"SLURM_PROCID": "x"}, {"SLURM_PROCID": "-1"}])
def test_nonsense(changes: dict[str, str]) -> None:
    with pytest.raises(TubeworksError, match="SLURM_PROCID"):
        World.from_env({**TASK, **changes})
