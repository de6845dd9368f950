"""Saves in the background and on disks that fail: what is committed is whole, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import faulty_disk
import pytest
import torch
from rank_processes import Job
from saver_worker import CELLS, HARMLESS, all_cases

from framework import files
from framework.errors import CheckpointError, TubeworksError
from framework.tracking.journal import Journal, read_journal
from framework.training.run_folder import append_event
from framework.training.snapshot import Share
from framework.training.storage import write_json

MESSAGES = {
    "ENOSPC": "no space left while writing",
    "EIO": "Input/output error",
    "EIO-sync": "Input/output error",
    "lost": "bytes after",
    "EROFS": "write permission",
    "ENOENT": "No such file or directory",
}


@pytest.fixture(scope="module")
def results(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ranks found."""
    folder = tmp_path_factory.mktemp("saving")
    job = Job(2, folder / "logs", all_cases, str(recipe_file), str(folder))
    codes = job.wait(500)
    assert codes == [0, 0], [job.said(rank)[-3000:] for rank in (0, 1)]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("fault", "part"), [(fault, part) for fault, parts in CELLS.items() for part in parts]
)
def test_a_fault_on_any_file_loses_nothing(results: list[dict[str, Any]], fault: str, part: str) -> None:
    first, second = (result[f"{fault}-{part}"] for result in results)
    assert first["message"] == second["message"], "all ranks leave with the same reason"
    if fault in HARMLESS:
        assert first["message"] == ""
        assert first["whole"] == ["step-00000001", "step-00000002"]
    else:
        text = first["message"]
        assert text.startswith("the checkpoint of step 2 was not written, earlier ones are untouched. Rank ")
        assert MESSAGES[fault] in text or (fault, part) == ("lost", "MANIFEST")
        assert part in text, "which file"
        assert first["whole"] == ["step-00000001"]
        assert first["left"] == [], "the space is given back"
    assert first["again"][-1] == "step-00000003", "the next save is whole"


def test_what_is_saved_is_the_state_of_its_step(results: list[dict[str, Any]]) -> None:
    for result in results:
        case = result["snapshot"]
        assert case["on_its_way"], "training went on while the disk was slow"
        assert case["differ"], "and changed the state"
        assert case["exact"] == [True, True]
        assert case["steps"] == [1, 2]
        assert case["stalls"] == [True, True]
        assert case["first"] == ["step-00000001"], "the second save waited for the first"


def test_a_slow_rank_is_named(results: list[dict[str, Any]]) -> None:
    said = [text for text in results[0]["slow"]["said"] if "still being written" in text]
    assert said, "the main rank says so"
    assert "training waits for rank 1" in said[0]


def test_without_memory_for_copies_training_waits(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["room"] == {"in_flight": False, "committed": [1]}
    assert any("host memory" in text for text in results[0]["slow"]["said"])


def test_numbers_that_are_not_finite_are_not_saved(results: list[dict[str, Any]]) -> None:
    for result in results:
        case = result["nan"]
        assert case["message"].startswith("weights or moments are not finite after step 1")
        assert f"exp_avg of {case['name']}, rank 1" in case["message"]
        assert case["left"] == 0


def test_a_save_that_fails_at_the_end_is_a_warning_beside_the_error_that_ends_the_run(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        assert result["closing"] == {"raised": "", "in_flight": False}
    said = [text for text in results[0]["slow"]["said"] if "step 1 was not finished" in text]
    assert len(said) == 1
    assert "no space left" in said[0]


# --- the other files of a run --------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(fault: str, part: str) -> None:
        monkeypatch.setattr(files, "disk", faulty_disk.FailingDisk(fault, part))

    return use


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EIO-sync"])
def test_run_json_is_the_old_or_the_new_one(tmp_path: Path, failing: Any, fault: str) -> None:
    write_json(tmp_path / "run.json", {"attempts": [0]})
    failing(fault, "run.json")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        write_json(tmp_path / "run.json", {"attempts": [0, 1]})
    assert json.loads((tmp_path / "run.json").read_text()) == {"attempts": [0]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "short"])
def test_events_and_journal_keep_whole_lines(tmp_path: Path, failing: Any, fault: str) -> None:
    append_event(tmp_path, "checkpoint", 1)
    with Journal(tmp_path, 0) as journal:
        journal.write(1, {"train/loss": 2.0})
        failing(fault, "")
        with pytest.raises(TubeworksError):
            journal.write(2, {"train/loss": 1.0})
        with pytest.raises(CheckpointError, match=r"events\.jsonl"):
            append_event(tmp_path, "checkpoint", 2)
        failing("slow", "nothing")
    assert [entry.step for entry in read_journal(tmp_path)] == [1]
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1


def test_the_errors_are_the_systems_own(tmp_path: Path) -> None:
    disk = faulty_disk.FailingDisk("ENOSPC", "file")
    descriptor = disk.create(tmp_path / "file")
    with pytest.raises(OSError, match="No space left") as caught:
        disk.write(descriptor, b"x")
    os.close(descriptor)
    assert caught.value.errno == errno.ENOSPC


def test_copies_of_what_a_gpu_holds_are_counted_as_they_are_allocated() -> None:
    """Pinned memory comes in powers of two: a third more than is needed for most weights of a ViT-H."""
    tensors = {"mine": torch.empty(3 * 2**20, dtype=torch.uint8), "none": torch.empty(0, device="meta")}
    there = {"there": torch.empty(3 * 2**18, device="meta"), "even": torch.empty(2**18, device="meta")}
    share = Share({"one": tensors, "two": there})
    assert share.bytes == 7 * 2**20
    assert share.host_bytes == 3 * 2**20 + 4 * 2**20 + 2**20
