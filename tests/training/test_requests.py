"""What an operator asks of a running training is done by all ranks, answered, and changes no number."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from rank_processes import journalled, start_training, wait_for_step

from framework.errors import TubeworksError
from framework.training.checkpoint_manifest import checkpoint_folders
from framework.training.requests import Requests
from framework.watch.attempts import attempts_of
from framework.watch.control import (
    COMMANDS,
    POLL_SECONDS,
    Mailbox,
    answer_path,
    excluded_nodes,
    read_answer,
    request_path,
    send_request,
    waiting_requests,
)
from launch.control import control_command

LONG = ("train.steps=4000", "checkpoint.every=4000", "guards.hang_seconds=20")


def test_the_life_of_an_operator(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *LONG)
    wait_for_step(job, run, 3)

    control_command(run, "checkpoint", None, 60, True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["done"]
    assert [folder.name for folder in checkpoint_folders(run)] == [f"step-{answer['step']:08d}"]

    control_command(run, "stack", None, 30, True)
    stacks = json.loads(capsys.readouterr().out)["stacks"]
    assert list(stacks) == ["rank-00000", "rank-00001"]
    assert all("in run_steps" in text for text in stacks.values()), stacks

    control_command(run, "profile", "2", 60, False)
    assert "profiles/step-" in capsys.readouterr().out
    (trace,) = (run / "profiles").glob("*.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    (table,) = (run / "profiles").glob("*.txt")
    assert "aten::" in table.read_text()

    with pytest.raises(TubeworksError, match="profile takes a number of steps from 1 to 100, not 'many'"):
        control_command(run, "profile", "many", 1, False)
    assert waiting_requests(run) == [], "answered requests are taken away"

    control_command(run, "exclude", "node7", 60, False)
    assert job.wait() == [128 + 12] * 2, job.said()[-2000:]
    assert excluded_nodes(run) == ["node7"]
    (attempt,) = attempts_of(run)
    assert attempt["cause"] == "stopped by SIGUSR2"
    assert attempt["checkpoint"] == attempt["end_step"]
    with pytest.raises(TubeworksError, match=r"no training works in .* \(stopped by SIGUSR2\)"):
        control_command(run, "stop", None, 1, False)


def test_stopping_saves_and_leaves_as_a_signal_would(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 2, *LONG)
    wait_for_step(job, run, 2)
    control_command(run, "stop", None, 60, False)
    assert job.wait() == [143, 143], job.said()[-2000:]
    (saved,) = checkpoint_folders(run)
    assert int(saved.name.removeprefix("step-")) == max(journalled(run))


def ask_at_once(run: Path, barrier: Any, node: str) -> None:
    barrier.wait()
    for number in range(20):
        send_request(run, "exclude", f"{node}-{number}")


def test_no_request_is_lost(tmp_path: Path) -> None:
    """Eight operators ask at the same moment, while rank 0 takes up and answers what it finds."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(9)
    senders = [context.Process(target=ask_at_once, args=(tmp_path, barrier, f"n{one}")) for one in range(8)]
    for sender in senders:
        sender.start()
    barrier.wait()
    mailbox, taken = Mailbox(tmp_path), []
    while any(sender.is_alive() for sender in senders) or waiting_requests(tmp_path):
        mailbox._looked = -POLL_SECONDS  # at once, not every second
        request = mailbox.look()
        if request is not None:
            taken.append(request)
            mailbox.answer(True, request.argument, len(taken))
    assert sorted(one.argument for one in taken) == sorted(f"n{a}-{b}" for a in range(8) for b in range(20))
    answers = [read_answer(tmp_path, one) for one in taken]
    assert [answer.text for answer in answers if answer] == [one.argument for one in taken]


def test_who_waits_when_the_training_ends_is_answered(tmp_path: Path) -> None:
    requests = Requests(tmp_path, is_main=True)
    first, second = send_request(tmp_path, "checkpoint"), send_request(tmp_path, "stop")
    assert requests.ask() == (COMMANDS.index("checkpoint") + 1, 1)
    requests.close(7)
    for request in (first, second):
        answer = read_answer(tmp_path, request)
        assert answer is not None
        assert (answer.done, answer.text) == (False, "the training has ended")
    assert waiting_requests(tmp_path) == []


@pytest.mark.parametrize("argument", ["9" * 30, "9" * 5000, "²", "-1", ""])
def test_no_argument_ends_the_training(tmp_path: Path, argument: str) -> None:
    requests = Requests(tmp_path, is_main=True)
    send_request(tmp_path, "profile", argument)
    assert requests.ask() == (COMMANDS.index("profile") + 1, 1)


def test_a_node_that_cannot_be_written_down_is_answered(tmp_path: Path) -> None:
    (tmp_path / "excluded-nodes.json").mkdir()  # as little to be written as on a full disk
    requests = Requests(tmp_path, is_main=True)
    request = send_request(tmp_path, "exclude", "node7")
    requests.ask()
    assert requests.begin("exclude", 1, 5) == 12
    requests.finish("exclude", 5)
    answer = read_answer(tmp_path, request)
    assert answer is not None
    assert not answer.done
    assert "node7 is not written down" in answer.text


def test_what_cannot_be_answered_is_done_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk, or control/ of another user: the answer cannot be written, nor the request taken away."""
    requests = Requests(tmp_path, is_main=True)
    request = send_request(tmp_path, "checkpoint")
    there = request_path(tmp_path, request.id)
    content = there.read_text()
    answer_path(tmp_path, request.id).mkdir()
    assert requests.ask() == (COMMANDS.index("checkpoint") + 1, 1)
    requests.finish("checkpoint", 5)
    assert "a request cannot be answered" in caplog.text
    there.write_text(content)
    assert requests._mailbox is not None
    requests._mailbox._looked = -POLL_SECONDS
    assert requests.ask() == (0, 0)
    following = send_request(tmp_path, "profile", "7")
    requests._mailbox._looked = -POLL_SECONDS
    assert requests.ask() == (COMMANDS.index("profile") + 1, 7)
    requests.close(9)
    assert read_answer(tmp_path, following) is not None


def test_what_was_asked_of_an_earlier_attempt_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    """An attempt is killed, and so is the `launch ctl RUN stop` that waited for it."""
    run = tmp_path / "run"
    job = start_training(recipe_file, run, 1, *LONG)
    wait_for_step(job, run, 2)
    job.kill()
    left_behind = send_request(run, "stop")
    following = start_training(recipe_file, run, 1, *LONG)
    wait_for_step(following, run, 2)
    answer = read_answer(run, left_behind)
    assert answer is not None
    assert (answer.done, answer.text) == (False, "it was asked before this attempt began; ask again")
    assert waiting_requests(run) == []
    control_command(run, "checkpoint", None, 60, False)
    assert following.processes[0].is_alive()
    following.kill()


def test_answers_that_nobody_fetches_are_taken_away(tmp_path: Path) -> None:
    requests = Requests(tmp_path, is_main=True)
    old, new = send_request(tmp_path, "stop"), send_request(tmp_path, "stop")
    requests.close(3)
    stack = send_request(tmp_path, "stack")
    for path in (answer_path(tmp_path, old.id), request_path(tmp_path, stack.id)):
        os.utime(path, (0, 0))
    foreign = tmp_path / "control" / "notes.json"
    foreign.touch()
    os.utime(foreign, (0, 0))
    Requests(tmp_path, is_main=True)
    assert sorted((tmp_path / "control").iterdir()) == sorted([answer_path(tmp_path, new.id), foreign])


def test_nobody_answers(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [{"attempt": 0, "ranks": 1}]}))
    with pytest.raises(TubeworksError, match="nobody answered within 0 s"):
        control_command(tmp_path, "checkpoint", None, 0.2, False)
    assert waiting_requests(tmp_path) == [], "a request that nobody wants any more is withdrawn"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(TubeworksError, match="not the folder of a run that has begun"):
        control_command(tmp_path, "checkpoint", None, 1, False)
