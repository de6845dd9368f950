"""Every sample once and the same result, on 1, 2 and 3 real ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framework.recipe.schema import Recipe

SCRIPT = Path(__file__).with_name("one_rank.py")


def evaluate_on(ranks: int, recipe: Path, workers: int = 0, order: str = "ordered") -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
        command = [sys.executable, str(SCRIPT), str(recipe), str(workers), order]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks
    return [json.loads(output) for output in outputs]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, recipe_of: Callable[..., Recipe]) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(recipe_of().model_dump_json())
    return path


@pytest.fixture(scope="module")
def alone(recipe_file: Path) -> dict[str, Any]:
    return evaluate_on(1, recipe_file)[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_result_of_one(
    ranks: int, recipe_file: Path, alone: dict[str, Any]
) -> None:
    answers = evaluate_on(ranks, recipe_file)
    for answer in answers:
        assert answer["calls"] == answers[0]["calls"], "collectives inside a model would fall out of step"
        for name, result in alone["results"].items():
            assert answer["results"][name] == pytest.approx(result, abs=1e-12)
    for name, indices in alone["seen"].items():
        assert indices == list(range(len(indices)))
        shares = [index for answer in answers for index in answer["seen"][name]]
        assert sorted(shares) == indices


def test_all_held_out_samples_take_part(alone: dict[str, Any]) -> None:
    samples = {name: result["samples"] for name, result in alone["results"].items()}
    assert samples == {"motion": 11, "digits": 13}


def test_a_forward_pass_holds_one_view_of_a_batch(alone: dict[str, Any]) -> None:
    """Memory must not grow with the number of views: 4 batches x 2 views of clips, 5 batches of images."""
    assert alone["calls"] == [["motion", 3]] * 8 + [["digits", 3]] * 5


def test_workers_change_nothing(recipe_file: Path, alone: dict[str, Any]) -> None:
    (answer,) = evaluate_on(1, recipe_file, workers=2)
    assert answer == alone


def test_shuffled_frames_change_clips_and_not_images(recipe_file: Path, alone: dict[str, Any]) -> None:
    (answer,) = evaluate_on(1, recipe_file, order="shuffled")
    assert answer["results"]["digits"] == alone["results"]["digits"]
    assert answer["results"]["motion"]["loss"] != alone["results"]["motion"]["loss"]
