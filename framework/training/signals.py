"""Signals belong to a thread.

A Python signal handler does not run while the main thread waits inside a collective. So the signals are
blocked in every thread of a rank and one thread takes them with `sigwait`. Before the first step it ends the
process, for nothing is lost; afterwards it only sets a flag: the loop agrees on it with the other ranks once
a step, saves and leaves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["HANDLED", "SignalFlag"]

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Ctrl-C, the scheduler's end, the scheduler's warning, and a terminal that is gone."""

AGAIN_SECONDS = 0.5
"""A second Ctrl-C that comes sooner is the first one: a terminal sends it, and a launcher passes it on."""


class SignalFlag:
    """The first signal that asked this rank to stop; 0 while there is none.

    Must be made before any other thread exists: threads inherit the mask that it sets. Processes that are
    started afterwards inherit it too and must unblock the signals themselves.
    """

    def __init__(
        self,
        leaving: Callable[[int], None] = lambda _number: None,
        *,
        leaves_early: bool = False,
        speaks: bool = False,
    ) -> None:
        """Begin to listen.

        Args:
            leaving: called with the signal when the process leaves at once, after what `before_leaving` adds.
            leaves_early: a signal before `begin` ends the process; without, it is kept until the first step.
            speaks: say on stderr that a signal came, at once.
        """
        # `sigwait` would also take what `nohup` has asked to ignore.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._handled = set(HANDLED) - ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, self._handled)
        self._received = 0
        self._when = 0.0
        self._over = False
        self._starting, self._speaks = leaves_early, speaks
        self._tidying = [leaving]
        self._leaving = threading.Lock()
        """Held by whoever decides whether the process leaves; never given back when it does."""
        self._thread = threading.Thread(target=self._wait, name="signals", daemon=True)
        self._thread.start()

    @property
    def received(self) -> int:
        """Number of the signal that asked to stop, or 0."""
        return self._received

    def begin(self) -> None:
        """The steps begin: from now on there is something to save. Does not return if the process leaves."""
        with self._leaving:
            self._starting = False

    @contextmanager
    def before_leaving(self, tidy: Callable[[int], None]) -> Iterator[None]:
        """As long as this lasts, `tidy` is called with the signal if the process leaves at once."""
        self._tidying.append(tidy)
        try:
            yield
        finally:
            self._tidying.remove(tidy)

    def end(self) -> None:
        """End the thread; signals stay blocked, so nothing interrupts what is left to do."""
        self._over = True
        while self._thread.is_alive():
            assert self._thread.ident is not None
            signal.pthread_kill(self._thread.ident, signal.SIGUSR2)
            self._thread.join(0.1)

    def _wait(self) -> None:
        while True:
            number = signal.sigwait(self._handled)
            if self._over:
                return
            with self._leaving:
                self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        if self._starting:
            self._say(f"{number.name}: leaving before the first step, nothing was trained")
            self._leave(number)
        if not self._received:
            # Only the flag: a thread that writes while the interpreter shuts down can abort the process.
            self._received, self._when = int(number), time.monotonic()
            self._say(f"{number.name}: stopping when this step is done and saved; Ctrl-C again: at once")
        elif number == signal.SIGINT and time.monotonic() - self._when > AGAIN_SECONDS:
            self._say("SIGINT again: leaving without saving; the newest checkpoint stays as it is")
            self._leave(number)

    def _leave(self, number: int) -> None:
        """End this process, whatever its main thread is at."""
        try:
            for tidy in reversed(self._tidying):
                tidy(number)
        except Exception:  # noqa: BLE001 - a defect, which is shown; the user wants to leave all the same
            traceback.print_exc()
        finally:
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError):  # nobody reads it any more
                # below the ^C of a terminal, and not through streams that are being taken apart
                os.write(2, f"{chr(10) if os.isatty(2) else ''}{text}{chr(10)}".encode())
