"""The journal loses nothing and survives what a killed process leaves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from framework.errors import TubeworksError
from framework.tracking.journal import Journal, complete_lines, last_attempt, read_journal


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def test_a_line_is_what_the_documentation_says(tmp_path: Path) -> None:
    with Journal(tmp_path, attempt=2) as journal:
        journal.write(7, {"train/loss": 0.5, "perf/samples_per_s": 3})
    (line,) = lines_of(tmp_path)
    assert list(line) == ["step", "time", "metrics", "attempt"]
    assert line["step"] == 7
    assert line["metrics"] == {"train/loss": 0.5, "perf/samples_per_s": 3.0}
    assert line["attempt"] == 2


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    with Journal(tmp_path, attempt=0) as journal:
        journal.write(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    (line,) = lines_of(tmp_path)
    assert line["metrics"] == {"a": None, "b": None, "c": 1.0}
    assert line["nonfinite"] == ["a", "b"]
    (entry,) = read_journal(tmp_path)
    assert entry.nonfinite == ("a", "b")


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_ignored_and_then_cut_off(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path, attempt=0) as journal:
        journal.write(1, {"loss": 1.0})
        journal.write(2, {"loss": 2.0})
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [entry.step for entry in read_journal(tmp_path)] == [1]
    with Journal(tmp_path, attempt=1) as journal:
        journal.write(3, {"loss": 3.0})
    # a line that only lacks its newline is whole: it is kept
    assert [line["step"] for line in lines_of(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    with Journal(tmp_path, attempt=0) as journal:
        journal.write(1, {"loss": 1.0})
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "metrics": {"' + b"x" * 200_000)
    Journal(tmp_path, attempt=1).close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


def test_a_line_that_is_not_json_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Journal(tmp_path, attempt=0) as journal:
        journal.write(1, {"loss": 1.0})
        os.write(journal._file, b"\x00\x00garbage\n")
        journal.write(2, {"loss": 2.0})
    assert [entry.step for entry in read_journal(tmp_path)] == [1, 2]
    assert "cannot be read" in caplog.text


def test_replayed_steps_are_dropped(tmp_path: Path) -> None:
    with Journal(tmp_path, attempt=0, start_step=0) as journal:
        for step in range(1, 8):
            journal.write(step, {"loss": float(step)})
    with Journal(tmp_path, attempt=1, start_step=4) as journal:
        journal.write(5, {"loss": 50.0})
    with Journal(tmp_path, attempt=2, start_step=5) as journal:
        journal.write(6, {"loss": 600.0})
        journal.write(7, {"loss": 700.0})
    found = [(entry.step, entry.attempt, entry.metrics["loss"]) for entry in read_journal(tmp_path)]
    assert found == [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 0, 4), (5, 1, 50), (6, 2, 600), (7, 2, 700)]
    assert last_attempt(tmp_path) == 2


def test_an_attempt_without_a_start_line_resumes_before_its_first_entry(tmp_path: Path) -> None:
    with Journal(tmp_path, attempt=0) as journal:
        for step in (10, 20, 30):
            journal.write(step, {"loss": 1.0})
    with Journal(tmp_path, attempt=1) as journal:
        journal.write(20, {"loss": 2.0})
    assert [(entry.step, entry.attempt) for entry in read_journal(tmp_path)] == [(10, 0), (20, 1)]


def test_a_later_evaluation_of_a_step_does_not_hide_its_training_metrics(tmp_path: Path) -> None:
    with Journal(tmp_path, attempt=0, start_step=0) as journal:
        journal.write(10, {"train/loss": 1.0, "eval/top_1": 0.1})
    with Journal(tmp_path, attempt=1, start_step=10) as journal:
        journal.write(10, {"eval/top_1": 0.2})
    found = [(entry.attempt, dict(entry.metrics)) for entry in read_journal(tmp_path)]
    assert found == [(0, {"train/loss": 1.0}), (1, {"eval/top_1": 0.2})]


def test_writers_in_two_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from framework.tracking.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), int(sys.argv[2]))\n"
        "for step in range(300): journal.write(step, {'x' * 50: 1.0})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)]) for number in range(2)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = lines_of(tmp_path)
    assert sorted((line["attempt"], line["step"]) for line in lines) == [
        (attempt, step) for attempt in range(2) for step in range(300)
    ]


def test_a_killed_writer_loses_nothing_that_was_written(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from framework.tracking.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 0)\n"
        "for step in range(50): journal.write(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert [entry.step for entry in read_journal(tmp_path)] == list(range(50))


def test_a_full_disk_is_an_error_that_leaves_whole_lines(tmp_path: Path) -> None:
    """A file size limit is what an unprivileged test can fill; the kernel answers with a short write, too."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from framework.errors import TubeworksError; from framework.tracking.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))\n"
        "journal = Journal(Path(sys.argv[1]), 0)\n"
        "try:\n    for step in range(9): journal.write(step, {'loss': 1.0})\n"
        "except TubeworksError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "journal.jsonl cannot be written" in done.stdout
    data = (tmp_path / "journal.jsonl").read_bytes()
    assert data.endswith(b"\n")
    assert [entry.step for entry in read_journal(tmp_path)] == list(range(len(data.splitlines())))


def test_a_folder_without_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TubeworksError, match="not the folder of a run"):
        read_journal(tmp_path)


def test_a_run_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TubeworksError, match="cannot be written"):
        Journal(tmp_path / "file" / "run", 0)


def test_complete_lines_never_stops_inside_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"aaaa\nbbbb\ncc")
    offset, found = 0, []
    while True:
        lines, after = complete_lines(path, offset, 2)
        if not lines:
            break
        assert after > offset
        offset = after
        found += lines
    assert found == [b"aaaa\n", b"bbbb\n"]
    assert offset == 10


def test_a_reader_beside_a_writer_only_sees_whole_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    stop = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(len(read_journal(tmp_path)))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(500):
        journal.write(step, {"loss": 1.0})
    stop.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(read_journal(tmp_path)) == 500
