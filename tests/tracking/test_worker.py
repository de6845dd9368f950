"""What the mirror's process hears from its training."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import IO

import pytest

from framework.tracking.worker import KILLED_SECONDS, Mailbox


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[IO[str]]:
    """What the training writes to; this process reads it as the mirror does."""
    reads, writes = os.pipe()
    with os.fdopen(reads) as ours, os.fdopen(writes, "w") as theirs:
        monkeypatch.setattr(sys, "stdin", ours)
        yield theirs


def test_a_message_is_heard_once_and_looking_for_it_takes_nothing(training: IO[str]) -> None:
    mailbox = Mailbox()
    assert not mailbox.filled(0)
    assert mailbox.wait(0) is None
    training.write(json.dumps({"status": "FINISHED", "seconds": 5}) + "\n{")
    training.flush()
    assert mailbox.filled(60)
    assert mailbox.filled(60)
    assert mailbox.wait(60) == {"status": "FINISHED", "seconds": 5}
    assert mailbox.wait(0) is None, "half a message is none"


def test_a_training_that_is_gone_is_heard_at_once_and_counts_as_killed(training: IO[str]) -> None:
    mailbox = Mailbox()
    training.write('{"status": "FIN')
    training.close()
    began = time.monotonic()
    assert mailbox.filled(600)
    assert mailbox.wait(600) == {"status": None, "seconds": KILLED_SECONDS}
    assert mailbox.filled(600), "and stays gone"
    assert time.monotonic() - began < 60
