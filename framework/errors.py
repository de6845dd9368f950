"""The errors that a user may see: each says what happened, where, and what to do.

The command line prints the message of a `TubeworksError` without a traceback and leaves with its
`exit_code`. Anything else that reaches the top is a defect and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CorruptSample",
    "DataError",
    "Hang",
    "ModelError",
    "PeerLost",
    "RecipeError",
    "SchedulerError",
    "TrainingStopped",
    "TubeworksError",
]


class TubeworksError(Exception):
    """Base of all errors with a message written for the user."""

    exit_code = 1


class RecipeError(TubeworksError):
    """A recipe that does not say what to do: unknown key, wrong type, missing file, illegal combination."""

    exit_code = 2


class ModelError(TubeworksError):
    """A model that cannot be built, or an input that it cannot take."""

    exit_code = 2


class DataError(TubeworksError):
    """Shards or a manifest that are missing, damaged, of another version, or do not fit the recipe."""

    exit_code = 3


class CorruptSample(DataError):
    """One sample whose bytes or pixels are not what the manifest promises.

    Carries where it lies, so that it can be reported, quarantined or replaced.
    """

    def __init__(self, reason: str, *, source: str, shard: str, key: str, offset: int) -> None:
        super().__init__(f"{reason} (source {source}, shard {shard}, key {key}, offset {offset})")
        self.reason = reason
        self.source = source
        self.shard = shard
        self.key = key
        self.offset = offset

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip from a data worker to its rank (keyword-only arguments do not by default)."""
        return (_rebuild_corrupt_sample, (self.reason, self.source, self.shard, self.key, self.offset))


def _rebuild_corrupt_sample(reason: str, source: str, shard: str, key: str, offset: int) -> CorruptSample:
    return CorruptSample(reason, source=source, shard=shard, key=key, offset=offset)


class CheckpointError(TubeworksError):
    """A checkpoint that cannot be written, does not verify, or does not fit the run."""

    exit_code = 4


class PeerLost(TubeworksError):
    """Another rank is gone in the middle of what all do together; its own output says why."""

    exit_code = 6


class Hang(TubeworksError):
    """No step ends any more; the post-mortem names the rank that the others wait for."""

    exit_code = 7


class SchedulerError(TubeworksError):
    """Slurm that is not there, does not answer, or refuses what it is asked."""

    exit_code = 8


class TrainingStopped(TubeworksError):
    """Training that ended itself: numbers that went wrong, or a limit that was reached."""

    exit_code = 5
