"""The sentinel of a rank: a process of its own that sees the rank hang or die, and writes down where.

It shares a page of memory with its rank (`framework.watch.page`) and a folder with the other sentinels:

    RUN/heartbeat/attempt-N/rank-00000.json   where a rank is, every few seconds; its stacks after a hang
    RUN/postmortem/attempt-N.md, .json        written by the lowest rank whose sentinel lives

No message goes through the ranks or their collectives, which are what does not work any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.watch.control import serve_stacks
from framework.watch.page import PHASES, Page

__all__ = ["COMPOSED", "ENDED", "FAILED", "HANGS", "KILL", "RUNNING", "SLOW", "Watched", "guard", "stacks_of"]

RUNNING, ENDED, FAILED = 0, 1, 2
"""States of a rank."""
HANGS, COMPOSED, KILL = 1, 2, 3
"""Verdicts: the job hangs and is being written down; the post-mortem is written; leave, the job hangs."""

SLOW = 3.0
"""So many times as long may the first step take, and phases that are slow by nature."""
SLOW_PHASES = ("start", "save", "evaluate", "finish")
RECORD_SECONDS = 5.0
LONGEST_LOOK = 5.0
"""Seconds between two looks that count as waiting; more, and this process was suspended itself."""
SETTLE_SECONDS = 3.0
"""How long the other ranks' records are waited for when one has hung or died."""
ELECTION_SECONDS = 4.0
"""How long a higher rank leaves the post-mortem to a lower one."""
WORKERS_SHOWN = 8


@dataclass(frozen=True)
class Watched:
    """What a sentinel is told at its start."""

    run: Path
    seconds: float
    """Without a beat for so long, a rank hangs; 0: never."""
    rank: int
    size: int
    pid: int
    stacks: int
    """Descriptor of the file that the stacks go to."""
    signal: int
    wake: int
    """Descriptor of an event: the rank has something to say."""


SamplesOf = Callable[[Mapping[str, Any]], list[str]]


def guard(page: Page, watched: Watched, samples_of: SamplesOf) -> int:
    """The life of a sentinel; returns its exit code when its rank is gone and everything is written."""
    _stand_aside(watched)
    rank = os.pidfd_open(watched.pid)
    tick = min(0.5, watched.seconds / 10) if watched.seconds else 0.5
    every = min(RECORD_SECONDS, max(tick, watched.seconds / 20)) if watched.seconds else RECORD_SECONDS
    patience, written = _Patience(page, watched), 0.0
    with contextlib.suppress(OSError):
        _record_path(watched, _attempt(watched, page)).unlink()  # of a start that was not one
    while True:
        ready, _, _ = select.select([rank, watched.wake], [], [], tick)
        state = page.get("state")
        if state == ENDED:
            return 0
        if rank in ready or state == FAILED:
            if page.get("attempt") >= 0 or watched.run.is_dir():
                _write_down(page, watched, samples_of, "failed" if state == FAILED else "died")
            page.set("verdict", KILL if patience.is_job_hung() else COMPOSED)
            return 0
        if patience.is_over():
            _end_hung(page, watched, samples_of, rank)
            return 0
        if page.get("attempt") >= 0 and time.monotonic() - written >= every:
            written = time.monotonic()
            with contextlib.suppress(OSError):  # a folder that cannot be written is the training's to report
                write_record(page, watched, "running")
                serve_stacks(watched.run, watched.rank, lambda: stacks_of(watched))


class _Patience:
    """How long a rank has not moved, in time that this process was awake: a suspended job does not hang."""

    def __init__(self, page: Page, watched: Watched) -> None:
        self._page, self._watched = page, watched
        # What a start that hung before its attempt began has left under the same number.
        self._stale = _alarm(watched, page)
        self._beats, self._idle, self._looked = -1, 0.0, time.monotonic()

    def is_over(self) -> bool:
        """Whether this rank is over its time, or another one has found that the job hangs."""
        now, beats = time.monotonic(), self._page.get("beats")
        self._idle = self._idle + min(now - self._looked, LONGEST_LOOK) if beats == self._beats else 0.0
        self._beats, self._looked = beats, now
        seconds = self._watched.seconds
        if not seconds:
            return False
        slow = self._page.get("step") == self._page.get("first_step")
        slow = slow or PHASES[self._page.get("phase")] in SLOW_PHASES
        if self._idle > seconds * (SLOW if slow else 1.0):
            return True
        return self._idle > seconds / 2 and self.is_job_hung()

    def is_job_hung(self) -> bool:
        """Whether a sentinel of this attempt has raised the alarm."""
        return _alarm(self._watched, self._page) not in (None, self._stale)


def _stand_aside(watched: Watched) -> None:
    """Leave signals and terminals to the rank; hold nothing of it open but what a sentinel needs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)
    first, second = sorted((watched.stacks, watched.wake))
    os.closerange(3, first)
    os.closerange(first + 1, second)
    os.closerange(second + 1, 65536)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)


def _end_hung(page: Page, watched: Watched, samples_of: SamplesOf, rank: int) -> None:
    """Raise the alarm, write everything down, and end the rank."""
    page.set("verdict", HANGS)
    with contextlib.suppress(OSError):
        folder = folder_of(watched.run, _attempt(watched, page))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hang").touch()
    _write_down(page, watched, samples_of, "hung")
    page.set("verdict", KILL)
    if not select.select([rank], [], [], 2.0)[0]:  # it cannot leave by itself
        with contextlib.suppress(ProcessLookupError):
            os.kill(watched.pid, signal.SIGKILL)


def _write_down(page: Page, watched: Watched, samples_of: SamplesOf, state: str) -> None:
    """This rank's last record, and, if it falls to this sentinel, the post-mortem of the job."""
    from framework.watch.postmortem import compose, postmortem_path

    attempt = _attempt(watched, page)
    target = postmortem_path(watched.run, attempt)
    try:
        write_record(page, watched, state, stacks_of(watched) if state == "hung" else "")
        records = _settled(watched, page)
        lower = [record for record in records if record["rank"] < watched.rank]
        if any(record["state"] == "running" and _fresh(record, watched) for record in lower):
            return  # a lower rank lives: its sentinel writes when it ends
        deadline = time.monotonic() + (ELECTION_SECONDS if watched.rank else 0.0)
        while time.monotonic() < deadline and not target.exists():
            time.sleep(0.05)
        first = min((record["rank"] for record in records), default=0)
        if not target.exists() and watched.rank == first:
            compose(watched.run, attempt, watched.size, records, samples_of, rank_lives=state != "died")
    except OSError as error:
        sys.stderr.write(f"no post-mortem: {error}\n")


def _settled(watched: Watched, page: Page) -> list[dict[str, Any]]:
    """The records of all ranks, when all have their last one or the time is over."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        records = read_records(folder_of(watched.run, _attempt(watched, page)))
        final = [record for record in records if record["state"] != "running"]
        if len(final) == watched.size or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def _fresh(record: Mapping[str, Any], watched: Watched) -> bool:
    return time.time() - record["written"] < max(30.0, watched.seconds / 4)


def _attempt(watched: Watched, page: Page) -> int:
    """The attempt's number; of one that has not begun yet, the number that it would get."""
    attempt = page.get("attempt")
    if attempt >= 0:
        return attempt
    try:
        return len(json.loads((watched.run / "run.json").read_text(encoding="utf-8"))["attempts"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def folder_of(run: Path, attempt: int) -> Path:
    """Where the ranks of an attempt write their records."""
    return run / "heartbeat" / f"attempt-{attempt}"


def _alarm(watched: Watched, page: Page) -> int | None:
    """When a sentinel has found that the job hangs, by the file system's clock; None: it does not."""
    try:
        return (folder_of(watched.run, _attempt(watched, page)) / "hang").stat().st_mtime_ns
    except OSError:
        return None


def write_record(page: Page, watched: Watched, state: str, stacks: str = "") -> None:
    """Write where the rank is, in one piece; not synced, because nobody needs it after a power cut."""
    now = time.monotonic()
    record = {
        "rank": watched.rank,
        "state": state,
        "host": platform.node(),
        "pid": watched.pid,
        "attempt": _attempt(watched, page),
        "step": page.get("step"),
        "micro": page.get("micro"),
        "phase": PHASES[page.get("phase")],
        "idle_s": round(now - page.get("beat_time"), 2),
        "pulse_s": round(now - page.get("pulse_time"), 2),
        "collectives": page.get("collectives"),
        "process": process_state(watched.pid),
        "seconds": {name: round(page.seconds(place), 3) for place, name in enumerate(PHASES)},
        "samples": _samples(page.read("samples")),
        "cause": page.read("cause"),
        "log": page.read("log").splitlines(),
        "stacks": stacks,
        "written": time.time(),
    }
    path = _record_path(watched, record["attempt"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _record_path(watched: Watched, attempt: int) -> Path:
    return folder_of(watched.run, attempt) / f"rank-{watched.rank:05d}.json"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of an attempt, by rank."""
    records = []
    for path in sorted(folder.glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError):
            records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def _samples(text: str) -> dict[str, list[int]]:
    samples: dict[str, list[int]] = {}
    for line in text.splitlines():
        name, _, numbers = line.partition(": ")
        with contextlib.suppress(ValueError):  # cut off, or being written
            samples[name] = [int(number) for number in numbers.split()]
    return samples


def process_state(pid: int) -> str:
    """What the kernel says of a process: `S (sleeping)`, `T (stopped)`, or `gone`."""
    return _status(pid).get("State", "gone")


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def stacks_of(watched: Watched) -> str:
    """The Python stacks of all threads of the rank and of its data workers."""
    texts = [f"rank {watched.rank}, process {watched.pid}, {process_state(watched.pid)}:"]
    texts.append(_dump(watched, watched.pid))
    for pid in _children(watched)[:WORKERS_SHOWN]:
        texts += [f"data worker {pid}, {process_state(pid)}:", _dump(watched, pid)]
    return "\n".join(texts)


def _children(watched: Watched) -> list[int]:
    """Processes below the rank that would answer; the signal would end others."""
    found, parents = [], [watched.pid]
    while parents:
        parent = parents.pop(0)
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                parents += [int(pid) for pid in path.read_text().split()]
        found += [parent] if parent != watched.pid else []
    bit = 1 << (watched.signal - 1)
    return [pid for pid in found if int(_status(pid).get("SigCgt", "0"), 16) & bit]


def _dump(watched: Watched, pid: int) -> str:
    """What a process writes when it is asked for its stacks; it may be stopped and not answer."""
    before = os.fstat(watched.stacks).st_size
    try:
        os.kill(pid, watched.signal)
    except ProcessLookupError:
        return "  (gone)\n"
    deadline, size = time.monotonic() + 1.0, before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = os.fstat(watched.stacks).st_size
        if now > before and now == size:
            break
        size = now
    text = os.pread(watched.stacks, size - before, before).decode("utf-8", errors="replace")
    return text or "  (no answer: it is stopped, or in a call that the kernel does not interrupt)\n"
