"""Ranks of a Slurm step find rank 0 through the run folder, whatever lies there from before."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from framework.errors import PeerLost
from framework.training import rendezvous
from framework.training.rendezvous import meet, meeting_file
from framework.world import World

STEP = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}


@pytest.fixture
def stranger() -> Iterator[int]:
    """Somebody who listens, and speaks another language."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def test_all_meet_at_a_port_that_rank_0_holds(tmp_path: Path) -> None:
    found: dict[int, dict[str, str]] = {}

    def rank(number: int) -> None:
        found[number] = meet(tmp_path, World(number, 3), STEP, seconds=60)

    # another step of the same number, of a cluster that was here before: an old word, and nobody there
    path = meeting_file(tmp_path, STEP)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"addresses": ["127.0.0.1"], "port": 9, "word": "old"}))
    threads = [threading.Thread(target=rank, args=(number,)) for number in (1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [0, 1, 2]
    assert len({environment["MASTER_PORT"] for environment in found.values()}) == 1
    store = TCPStore(found[1]["MASTER_ADDR"], int(found[1]["MASTER_PORT"]), is_master=False)
    assert store.get(rendezvous.WORD_KEY).decode() == json.loads(path.read_text())["word"]


def test_no_two_steps_share_a_file(tmp_path: Path) -> None:
    others = [{**STEP, name: "9"} for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")]
    files = {meeting_file(tmp_path, env) for env in (STEP, *others)}
    assert len(files) == 4


def test_a_rank_0_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match="rank 0 did not say in time where it is"):
        meet(tmp_path, World(1, 2), STEP, seconds=0.2)


def test_addresses_that_lead_nowhere(tmp_path: Path) -> None:
    path = meeting_file(tmp_path, STEP)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"addresses": ["no-such-host.invalid"], "port": 9, "word": "x"}))
    with pytest.raises(PeerLost, match=r"cannot be reached from .* at any of no-such-host\.invalid, port 9"):
        meet(tmp_path, World(1, 2), STEP, seconds=0.2)


def test_whoever_was_told_does_not_ask(tmp_path: Path) -> None:
    assert meet(tmp_path, World(0, 2), {**STEP, "MASTER_ADDR": "here"}) == {}
    assert meet(tmp_path, World(0, 2), {}) == {}
    assert meet(tmp_path, World(), STEP) == {}
    assert list(tmp_path.iterdir()) == []


def test_own_addresses_are_names_and_numbers_that_others_may_know() -> None:
    found = rendezvous.own_addresses(
        {**STEP, "SLURMD_NODENAME": "c1", "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3"}
    )
    assert "c1" in found
    assert "10.1.2.3" in found
    assert len(found) == len(set(found))
    assert "127.0.0.1" not in found
    elsewhere = {**STEP, "SLURM_NODEID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3"}
    assert "10.1.2.3" not in rendezvous.own_addresses(elsewhere)  # that is where srun runs, and not this node
