"""The process that mirrors a running training to MLflow; `framework.tracking.mirror` starts and ends it.

It is a process and not a thread of rank 0 because importing MLflow holds the interpreter for seconds, because
data workers are forked while it works (a lock that a thread holds in that moment stays locked in them for
ever), and because a process can be ended whatever its server does.

Standard input: the settings, then at the end `{"status": …, "seconds": …}`; an end of file instead means that
the training was killed. The status RUNNING is no end: another attempt will go on. Standard output: one JSON
object per message for the training's log.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from typing import Any

from framework.tracking.git import masked
from framework.tracking.lock import RunLock
from framework.tracking.sender import Sender, Settings, reason

__all__ = ["main"]

LONGEST_PAUSE_SECONDS = 30.0
KILLED_SECONDS = 20.0
KILLED = json.dumps({"status": None, "seconds": KILLED_SECONDS}).encode() + b"\n"
"""What a training would say that no longer can."""
RESTS = 1 / 64, 3.0
"""Least and most seconds of rest for a second of a call."""
LONGEST_REST_SECONDS = 1.0

logger = logging.getLogger("framework.tracking.worker")  # __name__ is __main__ here


class Reports(logging.Handler):
    """Sends log records to the training as lines of JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a training that is gone no longer reads it."""
        line = json.dumps({"level": record.levelno, "message": masked(record.getMessage())}) + "\n"
        try:
            os.write(sys.stdout.fileno(), line.encode())
        except OSError:
            self.handleError(record)


class Mailbox:
    """Lines from standard input, waited for with a time limit."""

    def __init__(self) -> None:
        self._file = sys.stdin.fileno()
        self._parent = os.getppid()
        self._data = b""

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None after `seconds`; the end of the training counts as being killed."""
        if not self.filled(seconds):
            return None
        line, _, self._data = self._data.partition(b"\n")
        return json.loads(line)

    def filled(self, seconds: float) -> bool:
        """Whether a message is there, after `seconds` at most."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._data:
            remaining = deadline - time.monotonic()
            if os.getppid() != self._parent:  # the pipe may be held open by the training's own children
                self._data = KILLED
            elif remaining <= 0:
                return False
            elif select.select([self._file], [], [], min(remaining, 1.0))[0]:
                self._data = self._data + data if (data := os.read(self._file, 65536)) else KILLED
        return True


class Follower:
    """Follows the journal until the end, through outages, of which each is reported once."""

    def __init__(self, sender: Sender, mailbox: Mailbox) -> None:
        self.sender = sender
        self.mailbox = mailbox
        self.lock = RunLock(sender.run)
        self.outage_since: float | None = None
        self.announced = False
        self.pause = sender.settings.poll_seconds
        self.rest = RESTS[1]
        self.sent, self.written = 0, 0

    def follow(self) -> None:
        """Work until the training says how it ended, then try once more and set the status."""
        message = None
        while message is None:
            self.attempt()
            message = self.mailbox.wait(self.pause)
        deadline = time.monotonic() + float(message["seconds"])
        when_killed = "RUNNING" if self.sender.settings.supervised else "KILLED"
        while not self.attempt(final=message["status"] or when_killed):
            if self.outage_since is not None or time.monotonic() > deadline:
                break  # one try is enough on a server that does not answer: `tubeworks sync` does it later
            time.sleep(0.2)

    def attempt(self, final: str | None = None) -> bool:
        """One round; whether everything that there is has been sent."""
        if not self.lock.acquire():  # a killed attempt's mirror is still sending
            return False
        try:
            self.sender.connect()
            if not self.announced:
                logger.info("MLflow run %s at %s", self.sender.run_id, self.sender.settings.uri)
                self.announced = True
            self.sender.send_points(after_call=self._rest)
            self.sender.send_files()
            if final not in (None, "RUNNING"):
                self.sender.finish(final)
        except Exception as error:  # noqa: BLE001 - whatever a server or its client does: report, and go on later
            self._failed(error)
            return False
        self._recovered()
        return True

    def _rest(self, seconds: float) -> None:
        """Rest after a call that took so long, unless the training has something to say.

        What has piled up in an outage would otherwise keep this process and the server at work without a
        pause, on cores that may be the training's; or all of a cluster's runs would fall upon their server.
        The rests become shorter where the training writes more than half of what is sent meanwhile, so that
        an outage is made up for in about the time that it took, else longer again.
        """
        sent, written = self.sender.offset, self.sender.journal_bytes()
        self.rest *= 0.5 if 2 * (written - self.written) > sent - self.sent else 2.0
        self.rest = min(max(self.rest, RESTS[0]), RESTS[1])
        self.sent, self.written = sent, written
        self.mailbox.filled(min(LONGEST_REST_SECONDS, self.rest * seconds))

    def _failed(self, error: Exception) -> None:
        self.sender.disconnect()
        self.pause = min(LONGEST_PAUSE_SECONDS, self.pause * 2)
        if self.outage_since is None:
            self.outage_since = time.monotonic()
            logger.warning(
                "MLflow at %s cannot be reached: %s. Training goes on; the journal keeps every point, and "
                "they are sent when MLflow answers again.",
                self.sender.settings.uri,
                reason(error),
            )

    def _recovered(self) -> None:
        self.pause = self.sender.settings.poll_seconds
        if self.outage_since is not None:
            seconds = time.monotonic() - self.outage_since
            self.outage_since = None
            logger.warning("MLflow answers again after %.0f s; what had piled up has been sent", seconds)


def main() -> int:
    """Follow one run."""
    # Signals are the training's; it ends us by the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    logging.getLogger("framework").addHandler(Reports())
    logging.getLogger("framework").setLevel(logging.INFO)
    mailbox = Mailbox()
    settings = mailbox.wait(60.0)
    if settings is None or "uri" not in settings:
        return 1
    Follower(Sender(Settings(**settings)), mailbox).follow()
    return 0


if __name__ == "__main__":
    sys.exit(main())
