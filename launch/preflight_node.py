"""The pre-flight on one node: `python -m launch.preflight_node RUN`, one task per node of a step.

Each check says what it saw and what is wrong. The report is a file per node in the run folder; the nodes wait
for each other's before they reduce something together, so that one with a broken disk cannot make them hang.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from framework.files import replace_text

__all__ = ["Check", "Settings", "check_node", "reports_folder"]

BLOCK = 4 << 20
REDUCED = 16 << 20
"""Bytes that are reduced between the nodes, a few times."""


@dataclass(frozen=True)
class Check:
    """One check of a node: what it saw, and what is wrong (empty: nothing)."""

    name: str
    seen: str
    problem: str
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What is demanded of a node; see `launch.site.Preflight`."""

    gpus: int
    nodes: int
    shards: Sequence[str]
    """Folders of shards."""
    scratch: str | None
    scratch_gb: float
    run_gb: float
    read_mb: float
    reduce_mb: float
    clock_seconds: float
    seconds: float
    checks: Sequence[str]
    """Commands of the site, run by bash; one that fails is a failed check."""


def reports_folder(run: Path, env: Mapping[str, str]) -> Path:
    """Where the reports of this attempt lie."""
    return (
        run / "launch" / "preflight" / f"{env.get('SLURM_JOB_ID', '0')}-{env.get('SLURM_RESTART_COUNT', '0')}"
    )


def check_node(run: Path, settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """All checks of this node; its report is written after each, so that a hang names what hangs."""
    node = env.get("SLURMD_NODENAME") or platform.node()
    folder = reports_folder(run, env)
    done: list[Check] = []

    def report(at: str) -> None:
        text = json.dumps({"node": node, "at": at, "checks": [asdict(one) for one in done]}, indent=1)
        replace_text(folder / f"{node}.json", text + "\n")

    for name, check in _own_checks(run, settings, env):
        report(name)
        done.append(_timed(name, check))
    report("ready")
    if settings.nodes > 1 and _all_ready(folder, settings):
        report("together")
        done += together(run, settings, env)
    report("done")
    return done


def _own_checks(
    run: Path, settings: Settings, env: Mapping[str, str]
) -> list[tuple[str, Callable[[], tuple[str, str]]]]:
    """What a node can find out alone, by name."""
    scratch = Path(settings.scratch or env.get("TMPDIR") or "/tmp")
    found: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("run folder", lambda: folder_check(run / "launch", settings.run_gb)),
        ("scratch", lambda: folder_check(scratch, settings.scratch_gb)),
    ]
    if settings.gpus:
        found.append(("gpus", lambda: _gpu_check(settings.gpus, env)))
    for place in settings.shards:
        found.append((f"shards {place}", lambda place=place: read_check(place, env, settings.read_mb)))
    for command in settings.checks:
        found.append((f"site: {command}", lambda command=command: command_check(command, settings.seconds)))
    return found


def folder_check(folder: Path, gigabytes: float) -> tuple[str, str]:
    """Free space and problem of a folder: it must take a file, and have so much room."""
    probe = folder / f".tubeworks-preflight-{platform.node()}-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * (1 << 20))
            file.flush()
            os.fsync(file.fileno())
        stat = os.statvfs(folder)
    except OSError as error:
        return "", f"{folder} cannot be written: {error.strerror}"
    finally:
        with suppress(OSError):
            probe.unlink()
    free = stat.f_bavail * stat.f_frsize / 1e9
    return (
        f"{free:.1f} GB free",
        "" if free >= gigabytes else f"{folder} has {free:.1f} GB, not {gigabytes:g}",
    )


def read_check(place: str, env: Mapping[str, str], least_mb: float) -> tuple[str, str]:
    """Megabytes a second from a shard; each node takes another one, so that not all ask for the same."""
    if "://" in place:
        return "remote shards are not read before they are needed", ""
    try:
        manifest: Any = json.loads((Path(place) / "manifest.json").read_text(encoding="utf-8"))
        names = [entry["name"] for entry in manifest["shards"]]
        name = names[int(env.get("SLURM_NODEID", "0")) % len(names)]
        read, began = 0, time.perf_counter()
        with (Path(place) / name).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            while read < 16 * BLOCK and (block := file.read(BLOCK)):
                read += len(block)
        rate = read / 1e6 / max(1e-6, time.perf_counter() - began)
    except OSError as error:
        return "", f"{error.filename or place} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        return "", f"{place} has no usable manifest.json: {error!r}"
    problem = f"{name} of {place} is read at {rate:.0f} MB/s, not {least_mb:g}" if rate < least_mb else ""
    return f"{rate:.0f} MB/s", problem


def command_check(command: str, seconds: float) -> tuple[str, str]:
    """Output of a command of the site, and its failure as a problem."""
    try:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"`{command}`: {error}"
    said = " ".join(f"{done.stdout} {done.stderr}".split())[-300:]
    return said, f"`{command}` left with code {done.returncode}: {said}" if done.returncode else ""


def together(run: Path, settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """What the nodes find out together: they meet, compare their clocks, and reduce something."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from framework.training.rendezvous import meet
    from framework.world import World

    began = time.perf_counter()
    world = World.from_env(env)
    if world is None:
        return []
    gpu = bool(settings.gpus) and torch.cuda.is_available()
    try:
        os.environ.update(meet(run, world, env, settings.seconds))
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=settings.seconds),
        )
        met = Check("meeting", os.environ["MASTER_ADDR"], "", time.perf_counter() - began)
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        clock = _timed("clock", lambda: clock_check(world.rank, device, settings.clock_seconds))
        rate = _timed("all-reduce", lambda: reduce_check(device, settings.reduce_mb))
        return [met, clock, rate]
    except Exception as error:  # noqa: BLE001 - whatever a network does must come into the report
        words = " ".join(str(error).split())[:300]
        return [
            Check(
                "all-reduce", "", f"the nodes do not reach each other: {words}", time.perf_counter() - began
            )
        ]


def clock_check(rank: int, device: Any, allowed: float) -> tuple[str, str]:
    """How far this node's clock is from the median of all, at the same moment."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    mine = torch.tensor([time.time()], dtype=torch.float64, device=device)
    times = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(times, mine)
    values = [float(one) for one in times]
    # of two that differ nobody knows which is right
    others = values[1 - rank] if len(values) == 2 else statistics.median(values)
    off = values[rank] - others
    return f"{off:+.2f} s", f"its clock is {off:+.1f} s off the others'" if abs(off) > allowed else ""


def reduce_check(device: Any, least_mb: float) -> tuple[str, str]:
    """Megabytes a second through an all-reduce of all nodes."""
    import torch
    import torch.distributed as dist

    values = torch.ones(REDUCED // 4, device=device)
    dist.all_reduce(values)  # connections are made by the first one
    began = time.perf_counter()
    for _ in range(3):
        values.fill_(1)
        dist.all_reduce(values)
    if float(values[0]) != dist.get_world_size():
        return "", f"the sum over the nodes is {float(values[0])}, not {dist.get_world_size()}"
    rate = 3 * REDUCED / 1e6 / (time.perf_counter() - began)
    return (
        f"{rate:.0f} MB/s",
        f"all-reduce moves {rate:.0f} MB/s, not {least_mb:g}" if rate < least_mb else "",
    )


def _gpu_check(gpus: int, env: Mapping[str, str]) -> tuple[str, str]:
    from launch.gpu_health import check_gpus

    problems, seen = check_gpus(gpus, env)
    return seen, "; ".join(problems)


def _timed(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    began = time.perf_counter()
    seen, problem = check()
    return Check(name, seen, problem, round(time.perf_counter() - began, 3))


def _all_ready(folder: Path, settings: Settings) -> bool:
    """Whether every node has said in time that nothing is wrong with it."""
    deadline = time.monotonic() + settings.seconds
    while time.monotonic() < deadline:
        os.listdir(folder)  # makes network file systems look again
        reports = []
        for path in folder.glob("*.json"):
            with suppress(OSError, ValueError):
                reports.append(json.loads(path.read_text(encoding="utf-8")))
        if any(check["problem"] for report in reports for check in report["checks"]):
            return False
        if sum(report["at"] in ("ready", "together", "done") for report in reports) >= settings.nodes:
            return True
        time.sleep(0.1)
    return False


def main() -> None:
    """Check this node as RUN/launch/preflight/settings.json says."""
    for number in (signal.SIGUSR2, signal.SIGTERM):  # the supervisor hears them too, and says what they mean
        signal.signal(number, signal.SIG_IGN)
    run = Path(sys.argv[1])
    values = json.loads((run / "launch" / "preflight" / "settings.json").read_text(encoding="utf-8"))
    check_node(run, Settings(**values), os.environ)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that takes its time


if __name__ == "__main__":
    main()
