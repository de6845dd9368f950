"""What the mirror's process hears from its training."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from framework.tracking.journal import journal_path
from framework.tracking.sender import Sender, Settings
from framework.tracking.worker import KILLED_SECONDS, RESTS, Follower, Mailbox


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


def test_the_mirror_rests_as_long_as_it_gains_on_the_training(training: IO[str], tmp_path: Path) -> None:
    sender = Sender(Settings(run=str(tmp_path), name="run", uri="http://127.0.0.1:9", experiment="tests"))
    follower = Follower(sender, Mailbox())

    def call(written: int, sent: int) -> float:
        with journal_path(tmp_path).open("ab") as journal:
            journal.write(bytes(written))
        sender.state["offset"] += sent
        follower._rest(0.0)
        return follower.rest

    call(100_000, 0)
    rests = [call(100, 1000) for _ in range(20)]
    assert rests == sorted(rests), "it gains: longer and longer"
    assert rests[-1] == RESTS[1]
    rests = [call(600, 1000) for _ in range(20)]
    assert rests == sorted(rests, reverse=True), "more than half is written meanwhile: shorter and shorter"
    assert rests[-1] == RESTS[0]
    journal_path(tmp_path).unlink()
    follower._rest(0.0)
