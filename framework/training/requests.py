"""What an operator asks of a running training (`tubeworks launch ctl`), done by all ranks at a step's end."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from framework.errors import TubeworksError
from framework.files import replace_text
from framework.watch.control import COMMANDS, Mailbox, excluded_nodes, is_count

__all__ = ["STOPS", "Requests"]

log = logging.getLogger(__name__)

STOPS = {"stop": signal.SIGTERM, "exclude": signal.SIGUSR2}
"""Commands that end the attempt, and the signal as which they do: a scheduler's end, or its warning."""
ROWS = 40


class Requests:
    """Rank 0 takes requests up and answers them; the other ranks learn of them in the step's exchange."""

    def __init__(self, run: Path, start: int = 0, *, is_main: bool) -> None:
        self._run = run
        self._mailbox = Mailbox(run) if is_main else None
        self._node = ""
        self._profiler: Any = None
        self._profile_until = 0
        # They are an earlier attempt's, and nothing says that whoever asked still wants it.
        self._refuse("it was asked before this attempt began; ask again", start)
        self._sweep()

    def ask(self) -> tuple[int, int]:
        """A new request as numbers for the exchange: the command's (0: none) and its argument."""
        if self._mailbox is None:
            return 0, 0
        try:
            request = self._mailbox.look()
        except OSError as error:
            log.warning("requests cannot be read: %s", error)
            return 0, 0
        if request is None:
            return 0, 0
        if request.command not in COMMANDS:
            self._answer(False, f"{request.command} is no command; known are {', '.join(COMMANDS)}", 0)
            return 0, 0
        self._node = request.argument
        count = int(request.argument) if is_count(request.argument) else 1
        return COMMANDS.index(request.command) + 1, count

    def begin(self, command: str, number: int, step: int) -> int:
        """Begin to do what was asked, after so many steps; the signal that it amounts to, or 0."""
        if command == "profile" and self._mailbox is not None and self._profiler is None:
            self._profiler, self._profile_until = _start_profiler(), step + max(1, number)
        if command == "exclude" and self._mailbox is not None:
            nodes = sorted({*excluded_nodes(self._run), self._node})
            try:
                replace_text(self._run / "excluded-nodes.json", json.dumps(nodes) + "\n")
            except OSError as error:
                self._answer(False, f"it stops, but {self._node} is not written down: {error}", step)
        return int(STOPS.get(command, 0))

    def finish(self, command: str, step: int) -> None:
        """Answer what is done with this step; `profile` is answered when its steps are over."""
        if self._mailbox is None:
            return
        if command in ("checkpoint", *STOPS):
            text = {"stop": ", the training stops", "exclude": f", {self._node} is not used again"}
            self._answer(True, f"checkpoint of step {step}{text.get(command, '')}", step)
        if self._profiler is not None and step >= self._profile_until:
            profiler, self._profiler = self._profiler, None
            self._attempt(lambda: _write_profile(self._run, profiler, step), step)

    def close(self, step: int) -> None:
        """The attempt is over: nothing stays without an answer."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        self._refuse("the training has ended", step)

    def _refuse(self, text: str, step: int) -> None:
        if self._mailbox is not None:
            try:
                self._mailbox.refuse(text, step)
            except OSError as error:
                log.warning("a request cannot be answered: %s", error)

    def _sweep(self) -> None:
        if self._mailbox is not None:
            try:
                self._mailbox.sweep()
            except OSError as error:
                log.warning("old answers to requests cannot be taken away: %s", error)

    def _attempt(self, work: Callable[[], str], step: int) -> None:
        try:
            self._answer(True, work(), step)
        except (OSError, TubeworksError) as error:
            self._answer(False, str(error), step)

    def _answer(self, done: bool, text: str, step: int) -> None:
        assert self._mailbox is not None
        try:
            self._mailbox.answer(done, text, step)
        except OSError as error:  # the training does not depend on it
            log.warning("a request cannot be answered: %s", error)


def _start_profiler() -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    profiler.start()
    return profiler


def _write_profile(run: Path, profiler: Any, step: int) -> str:
    """Write RUN/profiles/step-N.json.gz for a trace viewer, and a table of what took longest beside it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler.stop()
    folder = run / "profiles"
    folder.mkdir(exist_ok=True)
    trace = folder / f"step-{step:08d}.json.gz"
    profiler.export_chrome_trace(str(trace))
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=ROWS)
    (folder / f"step-{step:08d}.txt").write_text(table, encoding="utf-8")
    return f"trace in {trace}, table beside it"
