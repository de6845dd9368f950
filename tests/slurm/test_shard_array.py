"""Shards from an array of eight, of which two are killed, as from one machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
from cluster import Cluster, wait_until
from PIL import Image
from runs import PATIENCE, environment

from data_tools.importers.folder import collect_folder
from data_tools.items import inventory
from data_tools.sharding import ShardOptions, plan_shards, shard, unfinished
from framework.errors import DataError
from launch import slurm
from launch.shard_array import ShardJobs, submit_shards
from launch.wishes import Wishes

KILLED = (2, 5)


def images(folder: Path) -> None:
    generator = numpy.random.Generator(numpy.random.PCG64(1))
    for number in range(64):
        place = folder / f"class-{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(place / f"{number:03d}.png")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def element(array: str, number: int) -> int | None:
    """The process of an element of an array, once it is Python."""
    wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={number}".encode()}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment, words = (path / "environ").read_bytes(), (path / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if b"submitit.core._submit" in words and wanted.issubset(environment.split(b"\0")):
            return int(path.name)
    return None


def kill_element(array: str, number: int) -> None:
    """What the kernel does when memory runs out."""
    found: list[int] = []

    def appeared() -> bool:
        found[:] = [pid for pid in [element(array, number)] if pid is not None]
        return bool(found)

    wait_until(appeared, PATIENCE, f"element {number} does not start", every=0.05)
    os.kill(found[0], signal.SIGKILL)


def wait_for_end(*jobs: str) -> list[str]:
    wait_until(
        lambda: all(slurm.show_job(job).has_ended for job in jobs), PATIENCE, f"{jobs} do not end", 0.5
    )
    return [slurm.show_job(job).state for job in jobs]


def test_an_array_of_eight_with_two_killed(cluster: Cluster, tmp_path: Path) -> None:
    images(tmp_path / "images")
    found = inventory([collect_folder(tmp_path / "images", "tiny", split="train")])
    shard(found, ShardOptions(tmp_path / "local", samples=4))

    site, out = tmp_path / "site.yaml", tmp_path / "shards"
    site.write_text("partition: low\n")

    def submit(tasks: int = 8) -> ShardJobs:
        with patch.dict(os.environ, environment(0.0)):
            return submit_shards(out, tasks, 1, Wishes(time="10"), site)

    with pytest.raises(DataError, match="plan them first"):
        submit()
    assert plan_shards(found, ShardOptions(out, samples=4)) == 16

    first = submit()
    assert (first.shards, first.tasks) == (16, tuple(range(8)))
    for number in KILLED:
        kill_element(first.jobs[0].partition("_")[0], number)
    slurm.cancel(first.last_job)  # or it would make what they left
    states = wait_for_end(*first.jobs)
    assert [states[number] for number in KILLED] == ["FAILED", "FAILED"]
    assert states.count("COMPLETED") == 6
    assert unfinished(out) == [2, 5, 10, 13]
    assert not out.exists()

    again = submit()
    assert (again.shards, again.tasks) == (4, KILLED)
    slurm.cancel(again.jobs[1])  # and now the last job has to
    assert wait_for_end(again.last_job) == ["COMPLETED"]
    assert contents(out) == contents(tmp_path / "local")
    assert not out.with_name("shards.partial").exists()
