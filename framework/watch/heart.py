"""The heartbeat of a rank: where it is, told to a sentinel that is a process of its own.

A rank that hangs cannot tell anybody: its main thread waits in a collective, an extension keeps the
interpreter's lock, or it is stopped. So it says *before* everything what it is about to do, in memory that
it shares with its sentinel (`framework.watch.sentinel`), which is forked before torch starts its threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from framework.errors import Hang, TubeworksError
from framework.watch.attempts import close_own_attempt
from framework.watch.page import PHASES, Page
from framework.watch.sentinel import COMPOSED, ENDED, FAILED, HANGS, KILL, RUNNING, Watched, guard

__all__ = ["STACK_SIGNAL", "Heart", "start_heart"]

STACK_SIGNAL = 41
"""A real-time signal, on which a rank and its data workers write the stacks of all threads."""

PULSE_SECONDS = 0.5
COMPOSE_SECONDS = 8.0
"""How long rank 0 waits for the post-mortem of its failure, so that it goes to MLflow with the rest."""


class Heart:
    """Beats of this rank; without a page (evaluation, other systems than Linux) all calls do nothing."""

    def __init__(
        self,
        page: Page | None = None,
        *,
        run: Path = Path(),
        sentinel: int = 0,
        wake: int = -1,
        is_main: bool = False,
    ) -> None:
        self._page = page
        self._run = run
        self._sentinel = sentinel
        self._wake = wake
        self._is_main = is_main
        self._last = time.monotonic()
        self._collectives: Callable[[], int] = int
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to show that the interpreter answers; after the signal mask is set, which threads inherit."""
        if self._page is not None:
            thread = threading.Thread(target=self._pulse, args=(self._page,), name="pulse", daemon=True)
            thread.start()
            self._thread = thread  # not before it can be joined
            logging.getLogger().addHandler(_LastLines(self._page))

    def beat(
        self, phase: str, step: int | None = None, micro: int = 0, samples: Mapping[str, Any] | None = None
    ) -> None:
        """Say what begins: a phase of PHASES, its step, and the samples (source -> indices) it works on."""
        page = self._page
        if page is None:
            return
        now = time.monotonic()
        page.add_seconds(page.get("phase"), now - self._last)
        self._last = now
        if step is not None:
            page.set("step", step)
        page.set("micro", micro)
        page.set("phase", PHASES.index(phase))
        if samples is not None or phase == "data":
            page.write("samples", _listed(samples or {}))
        page.set("beat_time", now)
        page.set("beats", page.get("beats") + 1)

    def begin(self, attempt: int, first_step: int, collectives: Callable[[], int]) -> None:
        """An attempt is in the run folder; `collectives` counts how many of them this rank has entered."""
        self._collectives = collectives
        if self._page is not None:
            self._page.set("first_step", first_step)
            self._page.set("step", first_step)
            self._page.set("attempt", attempt)

    def failed(self, error: BaseException) -> None:
        """The attempt ends with an error: leave its words, and let rank 0 wait for the post-mortem.

        In a job that hangs the rank leaves here, as all do: what fails is contact to those that left first.
        """
        page = self._page
        if page is None or page.get("state") != RUNNING or page.get("attempt") < 0:
            return
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, TubeworksError):
            text += "\n" + "".join(traceback.format_exception(error))
        page.write("cause", text)
        page.set("state", FAILED)
        os.eventfd_write(self._wake, 1)
        deadline = time.monotonic() + COMPOSE_SECONDS
        while page.get("verdict") < COMPOSED and time.monotonic() < deadline:
            if not self._is_main and page.get("verdict") != HANGS:
                break
            time.sleep(0.02)
        if page.get("verdict") in (HANGS, KILL):
            os._exit(Hang.exit_code)

    def left(self, number: int) -> None:
        """The process leaves at once because of a signal: no crash, so there is no post-mortem."""
        page = self._page
        if page is None:
            return
        if self._is_main and page.get("attempt") >= 0:
            cause = f"stopped by {signal.Signals(number).name}"
            close_own_attempt(self._run, page.get("attempt"), cause, page.get("step"))
        self.end()

    def end(self) -> None:
        """Nothing more to watch: the sentinel leaves, and so does the thread."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        page, self._page = self._page, None  # the thread that takes signals may end it, too
        if page is not None and page.get("state") == RUNNING:
            page.set("state", ENDED)
            os.eventfd_write(self._wake, 1)
            os.waitpid(self._sentinel, 0)

    def _pulse(self, page: Page) -> None:
        """Show that the interpreter answers, and leave when the sentinel says that the job hangs."""
        while not self._over.wait(PULSE_SECONDS):
            with contextlib.suppress(RuntimeError):  # a group begins or ends at this moment
                page.set("collectives", self._collectives())
            page.set("pulse_time", time.monotonic())
            if page.get("verdict") == KILL:
                os._exit(Hang.exit_code)


class _LastLines(logging.Handler):
    """Keeps the last log lines of a rank where its sentinel reads them."""

    def __init__(self, page: Page) -> None:
        super().__init__(logging.INFO)
        self._page = page
        self._lines: deque[str] = deque(maxlen=40)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
        self._page.write("log", "\n".join(self._lines))


def start_heart(
    run: Path, seconds: float, rank: int, size: int, samples_of: Callable[[Mapping[str, Any]], list[str]]
) -> Heart:
    """Fork the sentinel of this rank, and begin to beat; `seconds` without a beat are a hang, 0: never.

    Must be called before other threads exist. `samples_of` names the samples of a record for a post-mortem.
    """
    if sys.platform != "linux":
        return Heart()
    page, stacks, wake = Page(), os.memfd_create("stacks"), os.eventfd(0)
    page.set("attempt", -1)
    page.set("beat_time", time.monotonic())
    page.set("pulse_time", time.monotonic())
    watched = Watched(run, seconds, rank, size, os.getpid(), stacks, STACK_SIGNAL, wake)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = guard(page, watched, samples_of)
        finally:
            os._exit(code)
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACK_SIGNAL])
    return Heart(page, run=run, sentinel=child, wake=wake, is_main=rank == 0)


def _listed(samples: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {' '.join(map(str, index.tolist()))}" for name, index in samples.items())
