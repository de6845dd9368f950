"""Ranks on this machine: `tubeworks train --ranks N`.

Under torchrun or srun the world is in the environment and this process is one rank of it. Otherwise the
ranks are started here as processes, watched together, and ended together.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.errors import Hang, PeerLost, TubeworksError
from framework.training.run_place import check_place, has_begun, missing_folders, remove_empty
from framework.training.storage import explain_os_error
from framework.watch.postmortem import newest_postmortem
from framework.wording import counted, plural
from framework.world import World

__all__ = ["accusations", "free_port", "rank_at_fault", "rank_environment", "run_ranks", "train_command"]

GRACE_SECONDS = 10.0
"""How long the other ranks may take to leave after one has died: they may wait for it in a collective."""

TOGETHER_SECONDS = 90.0
"""How long they may take after one has left by a decision of all: a signal, bad data, a full disk."""

POSTMORTEM_SECONDS = 9.0
"""How long the post-mortem of ranks that ended without a word is waited for."""

HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Signals that wait while ranks are being started."""

_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def train_command(recipe: str, overrides: Sequence[str], ranks: int | None, run: Path | None) -> int:
    """Train a recipe, or go on with a run folder, on `ranks` processes; returns the exit code.

    The default is one rank per GPU of this machine, and one where there are none.

    Errors:
        TubeworksError: of the recipe, or of this rank when it is one of a world that others started.
    """
    from framework.data.plan import check_shares
    from framework.recipe import load_recipe
    from framework.recipe.patches import check_clips_are_divided
    from framework.recipe.tube_sets import check_tubes_are_read
    from framework.training.elastic import fitted

    if (Path(recipe) / "recipe.yaml").is_file():
        run, recipe = run or Path(recipe), str(Path(recipe) / "recipe.yaml")
    resolved = load_recipe(recipe, overrides)
    check_tubes_are_read(resolved.recipe)
    run = run or Path("runs") / resolved.recipe.name
    if not has_begun(run):
        check_clips_are_divided(resolved.recipe)
    world = World.from_env()
    if world is None:
        wanted = ranks or _gpus() or 1
        if wanted > 1:
            check_gpus(wanted, _gpus())
            # The ranks check this too, but each of them costs memory and seconds to start.
            suited = fitted(resolved.recipe, run, wanted)
            check_shares(suited.data.mixture, wanted, suited.train.accumulation, suited.data.repeats)
            check_place(run)
            return run_ranks(["train", recipe, *overrides, "--run", str(run)], wanted, run / "logs")
        world = World()
        os.environ.update(rank_environment(world, free_port(), os.environ))
    elif ranks is not None and ranks != world.size:
        raise TubeworksError(
            f"--ranks {ranks} does not fit: the environment says that this is one of {world.size} ranks"
        )
    from framework.training.main import train_rank
    from launch.supervised import exit_code_of, supervision_of

    try:
        code = train_rank(resolved.recipe, run, world, supervision_of(run))
    except TubeworksError as error:
        if exit_code_of(error, error.exit_code, world, run) == error.exit_code:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 0
    return exit_code_of(None, code, world, run)


def check_gpus(ranks: int, gpus: int) -> None:
    """Make sure that every rank of this machine gets a GPU of its own, where there are any.

    Errors:
        TubeworksError: there are fewer.
    """
    if 0 < gpus < ranks:
        raise TubeworksError(
            f"{counted(ranks, 'rank')}, and {counted(gpus, 'GPU')} here that no two can share: start --ranks "
            f"{gpus}, or set CUDA_VISIBLE_DEVICES to nothing and train on the CPUs"
        )


def _gpus() -> int:
    """GPUs that this process may use, counted without torch, which takes seconds to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def free_port() -> int:
    """A TCP port on the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(world: World, port: int, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of one local rank; cores are shared out unless the user has said how."""
    threads = max(1, (os.cpu_count() or 1) // world.size)
    return {
        "OMP_NUM_THREADS": str(threads),
        **env,
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(arguments: Sequence[str], ranks: int, logs: Path) -> int:
    """Run `tubeworks ARGUMENTS` as `ranks` processes and return the exit code of the job.

    Rank 0 speaks on this terminal, the others write to `logs/rank-N.log`. Signals go to every rank. When one
    fails, the others get a while to leave and are then killed; the code is that of the rank at fault.

    Errors:
        CheckpointError: the log folder cannot be made.
    """
    missing = missing_folders(logs.parent)
    command = rank_command(arguments)
    port = free_port()
    began = time.time()
    processes: list[subprocess.Popen[bytes]] = []
    handlers: dict[int, Any] = {}
    # What comes from here on, where there is something to take away, is passed on when all ranks are there.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        with explain_os_error(logs):
            logs.mkdir(parents=True, exist_ok=True)
        handlers = _forward_signals(processes, listening=listens(arguments))
        for rank in range(ranks):
            world = World(rank, ranks, rank, ranks)
            environment = rank_environment(world, port, os.environ)
            processes.append(_start(command, environment, logs, rank, hold=listens(arguments)))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        codes = _wait(processes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    failed = rank_at_fault(codes)
    if failed is None:
        return 0
    code = codes[failed] or 0
    _explain(failed, code, codes, logs / f"rank-{failed}.log")
    _accuse(logs.parent, codes, began)
    _leave_no_trace(logs, codes, missing)
    if Hang.exit_code in codes:
        return Hang.exit_code
    return code if code >= 0 else 128 - code


def rank_command(arguments: Sequence[str]) -> list[str]:
    """What a rank runs."""
    return [sys.executable, "-m", "launch.cli", *arguments]


def listens(arguments: Sequence[str]) -> bool:
    """Whether the ranks take signals in a thread; until it is there they hold them back."""
    return arguments[0] == "train"


def rank_at_fault(codes: Sequence[int | None]) -> int | None:
    """The rank that made the job fail, by exit codes (None: was still running, and is killed); or None.

    A rank that was killed comes first, then one that failed by itself, last those that only lost contact to
    another; of equals the lowest.
    """

    def order(rank: int) -> tuple[int, int]:
        code = codes[rank] or 0
        return (0 if code < 0 else 2 if code == PeerLost.exit_code else 1, rank)

    return min((rank for rank, code in enumerate(codes) if code), key=order, default=None)


def _start(
    command: Sequence[str], env: Mapping[str, str], logs: Path, rank: int, *, hold: bool
) -> subprocess.Popen[bytes]:
    tied = _tie_to_launcher(hold=hold)
    if rank == 0:
        return subprocess.Popen(command, env=env, preexec_fn=tied)
    with (logs / f"rank-{rank}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=tied
        )


def _tie_to_launcher(*, hold: bool) -> Callable[[], None]:
    """What a new rank runs first: if the launcher is killed, the kernel tells the rank to save and leave.

    With `hold` it inherits that the launcher holds back signals for the moment.
    """
    prctl, launcher = ctypes.CDLL(None).prctl if sys.platform == "linux" else None, os.getpid()

    def tie() -> None:
        if not hold:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        if prctl is not None:
            prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != launcher:
                os._exit(128 + signal.SIGTERM)

    return tie


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait for all, or for a while after the first failure; the exit codes, None for who still runs."""
    deadline: float | None = None
    while any(process.poll() is None for process in processes):
        failures = [code for process in processes if (code := process.poll())]
        if deadline is None and failures:
            # What all ranks decide together they also leave together, however long rank 0 takes to tidy up.
            together = any(1 < code != PeerLost.exit_code for code in failures)
            deadline = time.monotonic() + (TOGETHER_SECONDS if together else GRACE_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return [process.poll() for process in processes]


def _forward_signals(processes: Sequence[subprocess.Popen[bytes]], *, listening: bool) -> dict[int, Any]:
    """Pass on what ends a job.

    A terminal's Ctrl-C reaches the ranks by itself; those that are `listening` take a second one of the same
    moment for the first, others would be disturbed by it.
    """

    def forward(number: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        if listening and number == signal.SIGINT:  # they may still be importing, which takes seconds
            # last, and not through a stream that this may have interrupted: nobody may read it any more
            with contextlib.suppress(OSError):
                os.write(2, f"SIGINT: passed on to {counted(len(processes), 'rank')}\n".encode())

    handlers: dict[int, Any] = {}
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has asked for
            handlers[number] = signal.signal(number, forward)
    from_terminal = sys.stdin is not None and sys.stdin.isatty() and not listening
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, (lambda *_: None) if from_terminal else forward)
    return handlers


def _leave_no_trace(logs: Path, codes: Sequence[int | None], missing: Sequence[Path]) -> None:
    """If all ranks refused to begin, as they have said, leave no folder that looks like a run."""
    crashed = any(code is None or code < 0 or code == 1 for code in codes)
    if crashed or (logs.parent / "run.json").exists():
        return
    with contextlib.suppress(OSError):  # the folder was there before, with files of others
        for log in logs.glob("rank-*.log"):
            log.unlink()
        remove_empty([logs, logs.parent, *missing[1:]])


def _accuse(run: Path, codes: Sequence[int | None], began: float) -> None:
    """Say whom the post-mortem accuses; those of ranks that died are written by sentinels, shortly after."""
    without_word = any(code is None or code < 0 or code == Hang.exit_code for code in codes)
    deadline = time.monotonic() + (POSTMORTEM_SECONDS if without_word and (run / "heartbeat").exists() else 0)
    while (path := newest_postmortem(run, began)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if path is None:
        return
    try:
        accused = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["accused"]
    except (OSError, ValueError, KeyError):
        accused = {}
    # Rank 0 has written its message to this terminal, unless it was ended without one.
    said = accused.get("0") if codes[0] not in (None, Hang.exit_code) and codes[0] > 1 else None
    for line in accusations({rank: reason for rank, reason in accused.items() if reason != said}):
        sys.stderr.write(f"{line}\n")
    sys.stderr.write(f"what every rank was at: {path}\n")


def accusations(accused: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the ranks that gave it: what all decide together is said once."""
    ranks: dict[str, list[str]] = {}
    for rank, reason in accused.items():
        ranks.setdefault(reason, []).append(rank)
    return [f"{plural('rank', len(its))} {', '.join(its)}: {reason}" for reason, its in ranks.items()]


def _explain(rank: int, code: int, codes: Sequence[int | None], log: Path) -> None:
    """Say which rank failed, and put its last lines where the user looks (rank 0 has spoken already)."""
    if code < 0:
        name = signal.Signals(-code).name
        advice = ": did the machine run out of memory?" if name == "SIGKILL" else ""
        sys.stderr.write(f"rank {rank} was ended by {name}{advice}\n")
    elif rank > 0:
        sys.stderr.write(f"rank {rank} left with exit code {code}\n")
    stuck = [str(other) for other, its in enumerate(codes) if its is None]
    if stuck:
        sys.stderr.write(f"ranks that did not leave by themselves and were killed: {', '.join(stuck)}\n")
    if rank == 0:
        return
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    except OSError as error:
        lines = [f"(cannot read it: {error})"]
    sys.stderr.write("".join([f"the end of {log}:\n", *(f"  {line}\n" for line in lines)]))
