"""Signals belong to a thread.

A Python signal handler does not run while the main thread waits inside a collective. So the signals are
blocked in every thread of a rank and one thread takes them with `sigwait`; it only sets a flag. The loop
agrees on the flag with the other ranks once a step, saves and leaves.
"""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["HANDLED", "SignalFlag"]

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Ctrl-C, the scheduler's end, the scheduler's warning, and a terminal that is gone."""


class SignalFlag:
    """The first signal that asked this rank to stop; 0 while there is none.

    Must be made before any other thread exists: threads inherit the mask that it sets. Processes that are
    started afterwards inherit it too and must unblock the signals themselves.
    """

    def __init__(self) -> None:
        # `sigwait` would also take what `nohup` has asked to ignore.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._handled = set(HANDLED) - ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, self._handled)
        self._received = 0
        self._over = False
        self._thread = threading.Thread(target=self._wait, name="signals", daemon=True)
        self._thread.start()

    @property
    def received(self) -> int:
        """Number of the signal that asked to stop, or 0."""
        return self._received

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
            if self._received and number == signal.SIGINT:
                # The user insists: leave at once, the last committed checkpoint stays valid.
                os._exit(128 + number)
            # Only the flag: a thread that writes while the interpreter shuts down can abort the process.
            self._received = self._received or int(number)
