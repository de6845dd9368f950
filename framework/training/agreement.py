"""What all ranks must know at the end of a step, agreed on with one small reduction."""

from __future__ import annotations

from framework.training.session import Session

__all__ = ["agreed_signal"]


def agreed_signal(session: Session) -> int:
    """The signal that asked any rank to stop, on every rank; 0 while there is none.

    How far the save in flight is goes with it.

    Errors:
        CheckpointError, TrainingStopped: a checkpoint could not be written.
    """
    signal, *flags = session.peers.highest([session.signals.received, *session.saver.flags()])
    session.saver.advance(*flags)
    return signal
