"""One sender, and one training, per run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

__all__ = ["RunLock"]


class RunLock:
    """Whoever holds it sends `RUN` to MLflow (or, by another `name`, does something else that only one may).

    It ends with the process that holds it, and with those that were forked from it, however they end. On a
    file system without locks everybody gets it: sending twice is slow but not wrong (see `sender`).
    """

    def __init__(self, run: Path, name: str = ".mlflow.lock") -> None:
        self.path = Path(run) / name
        self._file = -1

    def acquire(self) -> bool:
        """Whether the lock is ours now; does not wait."""
        if self._file >= 0:
            return True
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError:  # ENOLCK, ENOTSUP: no locks here
            os.close(file)
            return True
        if not self._is_ours(file):  # whoever held it has taken the file away with it
            os.close(file)
            return self.acquire()
        self._file = file
        return True

    def _is_ours(self, file: int) -> bool:
        """Whether the open file is still the one of this name."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give it back; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
