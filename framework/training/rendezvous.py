"""How the ranks of a Slurm step find rank 0: it takes a free port, and says where in the run folder.

A port that is computed from the job's id can be taken, is the same for jobs that share an id, and the same
again after a requeue. A host name that Slurm knows need not be one that the network knows. So rank 0 binds
whatever port the system gives, keeps it, and publishes it with every address that may lead to it; the others
try these until one leads to a store that knows the step's word.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, TCPStore

from framework.errors import PeerLost
from framework.training.storage import write_json
from framework.world import World

__all__ = ["meet", "meeting_file"]

log = logging.getLogger(__name__)

WORD_KEY = "tubeworks/word"
_kept: list[TCPStore] = []
"""The store of rank 0 must live as long as its process."""


def meeting_file(run: Path, env: Mapping[str, str]) -> Path:
    """The file of this step; no other step, attempt or element of an array has the same."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return run / "launch" / "rendezvous" / ("-".join(env.get(name, "0") for name in names) + ".json")


def meet(run: Path, world: World, env: Mapping[str, str], seconds: float = 300.0) -> dict[str, str]:
    """Meet the other ranks of this Slurm step; returns what torch.distributed lacks in the environment.

    That is nothing where somebody has said where rank 0 is, or where this is no step of several tasks.

    Errors:
        PeerLost: rank 0 has published nothing in time, or none of its addresses can be reached.
        CheckpointError: the run folder cannot be written.
    """
    if "MASTER_ADDR" in env or "SLURM_STEP_ID" not in env or world.size == 1:
        return {}
    path = meeting_file(run, env)
    if world.is_main:
        store = TCPStore("127.0.0.1", 0, world.size, is_master=True, wait_for_workers=False)
        word = secrets.token_hex(8)
        store.set(WORD_KEY, word)
        _kept.append(store)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"addresses": own_addresses(env), "port": store.port, "word": word})
        return _environment("127.0.0.1", store.port)
    deadline = time.monotonic() + seconds
    while True:
        said = _published(path, deadline)  # each time: a file of another cluster's job may lie there first
        for address in said["addresses"]:
            if _answers(address, said["port"], said["word"]):
                return _environment(address, said["port"])
        if time.monotonic() > deadline:
            raise PeerLost(
                f"rank 0 cannot be reached from {platform.node()} at any of {', '.join(said['addresses'])}, "
                f"port {said['port']}: do these names resolve here, and does a firewall let the port through?"
            )
        time.sleep(1.0)


def own_addresses(env: Mapping[str, str]) -> list[str]:
    """Names and addresses under which other nodes may find this one, the likeliest first."""
    node = env.get("SLURMD_NODENAME", "")
    launcher = env.get("SLURM_LAUNCH_NODE_IPADDR", "")
    found = [
        _address_towards(launcher),
        _resolved(platform.node()),
        platform.node(),
        node,
        _node_address(node),
    ]
    if env.get("SLURM_NODEID") == "0":  # srun runs where the batch script does, on the first node
        found.append(launcher)
    return list(dict.fromkeys(address for address in found if address))


def _environment(address: str, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for: the store is there, even for rank 0
    }


def _published(path: Path, deadline: float) -> dict[str, Any]:
    while True:
        with contextlib.suppress(OSError, ValueError):
            os.listdir(path.parent)  # makes network file systems look again
            return json.loads(path.read_text(encoding="utf-8"))
        if time.monotonic() > deadline:
            raise PeerLost(
                f"rank 0 did not say in time where it is ({path}): its own output says why, or its node does "
                "not see the run folder"
            )
        time.sleep(0.1)


def _answers(address: str, port: int, word: str) -> bool:
    """Whether the store of this step is there; a stranger's may be, where a name means another host here."""
    try:
        with socket.create_connection((address, port), timeout=5):
            pass
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.get(WORD_KEY).decode() == word
    except (OSError, DistError, RuntimeError) as error:
        log.debug("rank 0 is not at %s, port %d: %s", address, port, error)
        return False


def _address_towards(peer: str) -> str:
    """The address of this host on the network that leads to `peer` (nothing is sent)."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return _unless_loopback(probe.getsockname()[0])
    return ""


def _resolved(name: str) -> str:
    with contextlib.suppress(OSError):
        return _unless_loopback(socket.gethostbyname(name))
    return ""


def _unless_loopback(address: str) -> str:
    """Nothing for the address that every host calls itself."""
    return "" if address == "127.0.0.1" or address.startswith("0.") else address


def _node_address(node: str) -> str:
    """Where Slurm reaches the node; nothing where there is no scontrol."""
    if not node:
        return ""
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", node], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    words: Sequence[str] = done.stdout.split()
    return next((word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")), "")
