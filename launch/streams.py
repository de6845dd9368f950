"""The standard error of a command that must not end because nobody reads it any more."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["outlive_reader"]


class _Outliving(io.FileIO):
    """A file of which nobody notices that it cannot be written."""

    def write(self, content: ReadableBuffer, /) -> int:
        try:
            return super().write(content)
        except OSError:  # a reader or terminal that is gone, a full disk: there is nowhere to tell it
            return memoryview(content).nbytes


def outlive_reader() -> None:
    """Make what is written to `sys.stderr` from now on vanish where it cannot be written, without an error.

    A Ctrl-C ends `tee` as well as the training that it listens to, and that still has to save.
    """
    old = sys.stderr
    if old is None:  # closed by who started this
        return
    raw = _Outliving(old.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=old.encoding, errors=old.errors, line_buffering=True
    )
