"""Where data workers come from: a process that is forked early, does nothing, and forks workers when asked.

A rank that trains must not fork: it is large, has threads, and has touched the GPU. So it forks this process
before all that, and a worker that died or was killed because it hung is replaced from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from framework.data import progress
from framework.data.messages import CLOSE_ON_EXEC, MORE_DESCRIPTORS, Closed, receive, send
from framework.data.shared_memory import offer
from framework.errors import DataError

__all__ = ["Nursery", "leave_signals_to_the_rank", "worker_memory"]

_SET_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_COMMAND = struct.Struct("<cq")
_ANSWER = struct.Struct("<qq")
_REAP_SECONDS = 10.0
_DESCRIPTORS = 1 << 16

Make = Callable[[int], Any]


class Nursery:
    """Forks workers that answer ("make", (number, memories, kept)) with make(number).

    They may fill the memories (see `shared_memory.offer`); the value of ("told", value) is handed to `told`.
    """

    def __init__(self, make: Make, told: Callable[[Any], None] | None, board: progress.Board) -> None:
        _allow_many_descriptors()  # to this process, and so to its forks
        self._control, theirs = socket.socketpair()
        context = multiprocessing.get_context("fork")
        self.process: BaseProcess = context.Process(
            target=_nursery,
            args=(theirs, self._control, os.getpid(), make, told, board),
            name="data nursery",
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def spawn(self, slot: int) -> tuple[int, socket.socket]:
        """A new worker that reports its progress in a slot of the board: its process id and connection.

        Errors:
            Closed: the nursery is gone.
            DataError: this process has too few descriptors.
        """
        try:
            self._control.sendall(_COMMAND.pack(b"S", slot))
            data, descriptors, _, _ = socket.recv_fds(self._control, _ANSWER.size, 1, CLOSE_ON_EXEC)
            pid, _ = _ANSWER.unpack(data)
        except (OSError, struct.error) as error:
            raise Closed(str(error)) from error
        if not descriptors:  # the system leaves out those that there is no room for
            raise DataError(f"{os.strerror(errno.EMFILE)}: {MORE_DESCRIPTORS}")
        return pid, socket.socket(fileno=descriptors[0])

    def reap(self, pid: int) -> int | None:
        """The exit code of a dead worker, negative for a signal; None if the kernel cannot end it."""
        try:
            self._control.sendall(_COMMAND.pack(b"W", pid))
            known, status = _ANSWER.unpack(self._control.recv(_ANSWER.size))
        except (OSError, struct.error):
            return None
        return os.waitstatus_to_exitcode(status) if known else None

    def close(self) -> None:
        """End all workers and the nursery itself."""
        with contextlib.suppress(OSError):
            self._control.sendall(_COMMAND.pack(b"Q", 0))
        self._control.close()
        self.process.join(_REAP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(1.0)
        if self.process.exitcode is not None:
            self.process.close()


def _allow_many_descriptors() -> None:
    """Pixels come by descriptors, and where nobody raised the limit it is 1024, for what is under way even
    of all processes of a user; a process may raise its own as far as the administrator allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _nursery(
    control: socket.socket,
    others: socket.socket,
    parent: int,
    make: Make,
    told: Callable[[Any], None] | None,
    board: progress.Board,
) -> None:
    """Fork and collect workers until the rank hangs up."""
    others.close()
    leave_signals_to_the_rank(parent)
    gc.freeze()  # pages that no collection touches stay shared with the workers
    children: set[int] = set()
    while True:
        what, number = _command(control)
        if what == b"Q":
            break
        if what == b"S":
            ours, theirs = socket.socketpair()
            me = os.getpid()
            pid = os.fork()
            if pid == 0:
                control.close()
                theirs.close()
                _worker(ours, me, make, told, board, number)
            ours.close()
            socket.send_fds(control, [_ANSWER.pack(pid, 0)], [theirs.fileno()])
            theirs.close()
            children.add(pid)
        else:
            status = _collect(number)
            children.discard(number)
            control.sendall(_ANSWER.pack(status is not None, status or 0))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        _collect(pid)
    os._exit(0)


def _command(control: socket.socket) -> tuple[bytes, int]:
    try:
        return _COMMAND.unpack(control.recv(_COMMAND.size))
    except (OSError, struct.error):  # the rank is gone
        return b"Q", 0


def _collect(pid: int) -> int | None:
    """The wait status of a child that is dead or about to be; None if it does not die."""
    deadline = time.monotonic() + _REAP_SECONDS / 2
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:  # stuck in the kernel, reading from a dead file system
            return None
        time.sleep(0.002)


def leave_signals_to_the_rank(parent: int) -> None:
    """A scheduler signals whole process groups; the rank finishes its step then, and ends us itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _worker(
    connection: socket.socket,
    parent: int,
    make: Make,
    told: Callable[[Any], None] | None,
    board: progress.Board,
    slot: int,
) -> None:
    """Make what is asked for until the rank hangs up; never returns."""
    code = 1
    try:
        leave_signals_to_the_rank(parent)
        torch.set_num_threads(1)
        progress.report_to(board, slot)
        while True:
            what, value = receive(connection)
            if what == "told":
                if told is not None:
                    told(value)
                continue
            number, memories, kept = value
            offer(memories, kept)
            progress.rest()
            send(connection, (number, *_made(make, number), worker_memory()))
            progress.rest()
    except Closed:
        code = 0
    except BaseException:  # noqa: BLE001 - the last words of a fork that must not run its parent's handlers
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _made(make: Make, number: int) -> tuple[Any, tuple[BaseException, str] | None]:
    """(item, None), or (None, (error, traceback)) for a defect in the code."""
    try:
        return make(number), None
    except Exception as error:  # noqa: BLE001 - the rank raises it
        return None, (error, traceback.format_exc())


def worker_memory() -> int:
    """Bytes of memory that this process has for itself: anonymous pages, those of the fork included."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared, *_ = file.read().split()
    except OSError:  # not Linux
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
