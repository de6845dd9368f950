"""Why attempts end and whether a run starts again, without a Slurm: every rule of `launch.requeue`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.requeue import cause_of_stop, decide, stopped_by_guard
from launch.slurm_answers import Job, parse_job, parse_keys, parse_limit, parse_past
from launch.submission import Attempt, attempts_of, begin_attempt, end_attempt, write_stop

JOB = """\
JobId=25 ArrayJobId=24 ArrayTaskId=1 JobName=tiny
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:01 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=2026-11-20T18:06:07 EligibleTime=2026-11-20T18:06:07
   StartTime=2026-11-20T18:06:10 EndTime=2026-11-20T19:06:10 Deadline=N/A
   PreemptEligibleTime=2026-11-20T18:06:10 PreemptTime=None
   Partition=low AllocNode:Sid=localhost:28496
   ReqNodeList=(null) ExcNodeList=c[7-8]
   NodeList=c[1-2]
   NumNodes=2-4 NumCPUs=4 NumTasks=4 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   WorkDir=/a folder/with JobState=FAILED in it
   Comment=stopped: a = b
"""


def job(**changes: object) -> Job:
    return replace(parse_job(parse_keys(JOB)), **changes)


def test_what_scontrol_says() -> None:
    found = job()
    assert (found.job_id, found.state, found.restarts, found.requeues) == ("24_1", "RUNNING", 2, True)
    assert (found.nodes, found.node_count, found.excluded) == ("c[1-2]", 2, "c[7-8]")
    assert found.work_dir == "/a folder/with JobState=FAILED in it"
    assert found.comment == "stopped: a = b"
    assert found.preempted is None
    assert found.started is not None
    assert found.ends == found.started + 3600
    assert found.limit == 3600
    limits = [parse_limit(text) for text in ("1-02:00:01", "30:00", "UNLIMITED", "Partition_Limit", "")]
    assert limits == [93601.0, 1800.0, None, None, None]


@pytest.mark.parametrize(
    ("changes", "left", "cause"),
    [
        ({"preempted": 1.0}, 3000, "preempted"),
        ({"preempted": 1.0, "state": "COMPLETING", "restarts": 3}, 3000, "preempted"),  # grace is over
        ({"state": "COMPLETING", "restarts": 3}, 3000, "lost"),
        ({"state": "COMPLETING", "limit": 86400.0}, 3000, "cancelled"),
        ({"state": "CANCELLED", "limit": None}, 3000, "cancelled"),
        ({"state": "COMPLETING"}, 0, "time limit"),  # it ran to the end of its limit
        ({}, 100, "time limit"),
        ({}, 3000, "signal"),
        ({"state": "PENDING", "restarts": 3}, 3000, "lost"),  # somebody has requeued it
    ],
)
def test_why_a_job_has_to_stop(changes: dict[str, object], left: float, cause: str) -> None:
    found = job(**changes)
    assert found.ends is not None
    assert cause_of_stop(found, 2, found.ends - left, signal_seconds=60) == cause


def history(*ends: tuple[str, int], job_id: str = "1") -> list[Attempt]:
    """Attempts by cause and checkpoint that they left."""
    attempts, step = [], 0
    for number, (cause, to_step) in enumerate(ends):
        attempts.append(
            Attempt(number, job_id, number, "c1", 0.0, step, 1.0, to_step, cause, 1, f"note {number}")
        )
        step = to_step
    return attempts


@pytest.mark.parametrize(
    ("ends", "again", "status", "reason"),
    [
        ([("finished", 9)], False, "FINISHED", "finished"),
        ([("cancelled", 9)], False, "KILLED", "cancelled"),
        ([("refused", 0)], False, "FAILED", "trying again is no use: note 0"),
        ([("preempted", 0)] * 9, True, "RUNNING", "preempted"),
        ([("crashed", 0), ("crashed", 0)], True, "RUNNING", "crashed"),
        ([("crashed", 0), ("lost", 0), ("crashed", 0)], False, "FAILED", "3 attempts in a row"),
        (
            [("crashed", 0), ("preempted", 0), ("crashed", 0), ("crashed", 0)],
            False,
            "FAILED",
            "the last crashed: note 3",
        ),
        ([("crashed", 5), ("crashed", 6), ("crashed", 7)], True, "RUNNING", "crashed"),
        ([("crashed", 5), ("crashed", 5), ("crashed", 6)], True, "RUNNING", "crashed"),
        (
            [("crashed", 5), ("crashed", 5), ("crashed", 5), ("crashed", 5)],
            False,
            "FAILED",
            "newer than step 5",
        ),
        ([("time limit", n) for n in range(1, 6)], True, "RUNNING", "time limit"),
        ([("time limit", n) for n in range(1, 7)], False, "KILLED", "it was 5 times, which is the limit"),
        ([("crashed", n) for n in range(1, 7)], False, "FAILED", "it was 5 times, which is the limit"),
    ],
)
def test_whether_a_run_starts_again(
    ends: list[tuple[str, int]], again: bool, status: str, reason: str
) -> None:
    decision = decide(history(*ends), max_requeues=5, max_crashes=3)
    assert (decision.again, decision.status) == (again, status)
    assert reason in decision.reason


def test_a_person_who_submits_again_starts_the_guard_anew() -> None:
    before = history(("crashed", 0), ("crashed", 0), ("crashed", 0))
    assert stopped_by_guard(before, 3) is not None
    after = replace(before[-1], number=3, job_id="2")
    assert stopped_by_guard([*before, after], 3) is None


def test_attempts_survive_a_crash_of_their_supervisor(tmp_path: Path) -> None:
    first = begin_attempt(tmp_path, "7", 0, "c[1-2]")
    write_stop(tmp_path, first.number, "preempted")
    second = begin_attempt(tmp_path, "7", 1, "c[1-2]")  # nobody wrote down how the first one ended
    third = begin_attempt(tmp_path, "7", 2, "c3")
    end_attempt(tmp_path, third, "crashed", 137, "out of memory")
    with (tmp_path / "launch" / "attempts.jsonl").open("a") as file:
        file.write('{"number": 3, "job_')
    found = attempts_of(tmp_path)
    assert [one.cause for one in found] == ["preempted", "lost", "crashed"]
    assert (found[2].exit_code, found[2].note, found[2].nodes) == (137, "out of memory", "c3")
    assert second.from_step == 0


def test_bad_nodes_are_nobodys_crash() -> None:
    """They may be as many as there are; a crash afterwards counts from one."""
    bad = Attempt(0, "7", 0, "c1", 0.0, 0, ended=1.0, to_step=0, cause="bad node", note="c1: no scratch")
    history = [replace(bad, number=number) for number in range(9)]
    decision = decide(history, max_requeues=1, max_crashes=2)
    assert decision.again
    assert decision.reason == "bad node: c1: no scratch"
    crashed = replace(bad, number=9, cause="crashed")
    assert decide([*history, crashed], max_requeues=1, max_crashes=2).again
    assert not decide([*history, crashed, crashed], max_requeues=9, max_crashes=2).again


def test_rows_of_the_accounts() -> None:
    times = ["2026-11-20T18:06:07", "Unknown"]
    row = parse_past(
        ["24_[0,2-8:3%4]", "CANCELLED by 99999999", "0:15", "None assigned", *times, "/run/code"]
    )
    assert [one for one in range(10) if row.is_of(f"24_{one}")] == [0, 2, 5, 8]
    assert not any(row.is_of(other) for other in ("24", "2_0", "24_", "24_x"))
    assert (row.state, row.cancelled_by, row.nodes, row.ended) == ("CANCELLED", "99999999", "", None)
    assert parse_past(["24_1", "TIMEOUT", "0:0", "c1", *times, "/run/code"]).is_of("24_1")
