"""Which GPU a rank and its threads take, seen without one: what is asked of CUDA is written down."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framework.errors import TubeworksError
from framework.training.distributed import choose_device, rank_variables
from framework.training.transfer import on_device
from framework.world import World


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The threads that chose a GPU, and which; there seem to be some."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device.index))
    )
    return calls


@pytest.mark.parametrize(
    ("seen", "index"),
    [pytest.param(8, 3, id="all GPUs of the node"), pytest.param(1, 0, id="its own alone")],
)
def test_deepspeed_is_told_the_gpu_that_the_rank_took(
    chosen: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, seen: int, index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    world = World(rank=11, size=16, local_rank=3, local_size=8)
    device = choose_device(world)
    assert device == torch.device("cuda", index)
    assert [number for _, number in chosen] == [index]
    assert rank_variables(world, device) == {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": str(index)}


def test_more_ranks_than_gpus_are_refused(
    chosen: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(TubeworksError, match=r"8 ranks on this node see 4 GPUs.*start 4 ranks"):
        choose_device(World(rank=11, size=16, local_rank=3, local_size=8))
    assert chosen == []


def test_on_a_cpu_ranks_have_their_place_on_the_node() -> None:
    world = World(rank=11, size=16, local_rank=3, local_size=8)
    assert rank_variables(world, torch.device("cpu"))["LOCAL_RANK"] == "3"


def test_the_copying_thread_works_on_the_gpu_of_its_rank(
    chosen: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's own GPU is number 0 at first, and using it takes memory there."""
    event = SimpleNamespace(record=lambda stream: None)
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    current = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr("framework.training.transfer.copied", lambda batch, device: batch)
    batches = (SimpleNamespace(groups={}) for _ in range(2))
    assert len(list(on_device(batches, torch.device("cuda", 5)))) == 2  # type: ignore[arg-type]
    assert set(chosen) == {("ahead", 5)}
    assert waited == [event, event]
