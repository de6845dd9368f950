"""One page of memory that a rank shares with its sentinel: where the rank is, and what it was told last.

Plain stores into shared memory: a beat costs microseconds, never waits, and is seen even while the rank is
stopped, sits in a collective, or in an extension that holds the interpreter's lock.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

__all__ = ["PHASES", "Page"]

PHASES = (
    "start",
    "data",
    "forward",
    "backward",
    "agree",
    "update",
    "record",
    "save",
    "evaluate",
    "finish",
)
"""What a rank may be at; within a step in this order."""

_FIELDS = {
    "beats": "Q",
    "beat_time": "d",
    "pulse_time": "d",
    "step": "q",
    "first_step": "q",
    "micro": "q",
    "phase": "q",
    "attempt": "q",
    "collectives": "q",
    "state": "q",
    "verdict": "q",
}
_SECONDS = 1024  # where the seconds per phase begin
_TEXTS = {"samples": (4096, 57344), "log": (61440, 16384), "cause": (77824, 16384)}
_BYTES = 98304


class Page:
    """The fields of a rank, readable and writable by both processes; times are `time.monotonic`."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BYTES)
        self._offsets = {name: (8 * place, "<" + kind) for place, (name, kind) in enumerate(_FIELDS.items())}

    def get(self, name: str) -> Any:
        """A number."""
        offset, kind = self._offsets[name]
        return struct.unpack_from(kind, self._memory, offset)[0]

    def set(self, name: str, value: float) -> None:
        """Store a number."""
        offset, kind = self._offsets[name]
        struct.pack_into(kind, self._memory, offset, value)

    def add_seconds(self, phase: int, seconds: float) -> None:
        """Count time that a phase took."""
        offset = _SECONDS + 8 * phase
        struct.pack_into("<d", self._memory, offset, self.seconds(phase) + seconds)

    def seconds(self, phase: int) -> float:
        """The time that a phase took so far."""
        return struct.unpack_from("<d", self._memory, _SECONDS + 8 * phase)[0]

    def write(self, name: str, text: str) -> None:
        """Store a text; of a long one the end is kept."""
        offset, room = _TEXTS[name]
        data = text.encode("utf-8", errors="replace")[-(room - 4) :]
        struct.pack_into("<I", self._memory, offset, 0)
        self._memory[offset + 4 : offset + 4 + len(data)] = data
        struct.pack_into("<I", self._memory, offset, len(data))

    def read(self, name: str) -> str:
        """A text; what is being written at this moment may come garbled, never too long."""
        offset, room = _TEXTS[name]
        length = min(struct.unpack_from("<I", self._memory, offset)[0], room - 4)
        return self._memory[offset + 4 : offset + 4 + length].decode("utf-8", errors="replace")
