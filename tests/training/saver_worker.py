"""What `test_saving` lets two ranks do: one engine, and saves that meet every kind of trouble."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty_disk
import torch
import torch.distributed
from stage_worker import DEVICE, begin, contents, train_steps

from framework.errors import CheckpointError, TrainingStopped
from framework.files import Disk
from framework.recipe import load_recipe
from framework.training import saver as saver_module
from framework.training.checkpoint import CheckpointReader
from framework.training.checkpoint_manifest import checkpoint_folders, verify
from framework.training.distributed import Peers, start_process_group
from framework.training.saver import Saver
from framework.training.state import TrainState
from framework.world import World

EVERY = ("weight-00001", "average-00000", "exp_avg-00001", "exp_avg_sq-00000", "fixed", "MANIFEST")
SOME = ("weight-00001", "fixed", "MANIFEST")
CELLS = {
    **dict.fromkeys(("ENOSPC", "EIO"), EVERY),
    **dict.fromkeys(("EIO-sync", "lost", "short", "EROFS", "ENOENT"), SOME),
    "slow": ("MANIFEST",),
}
"""Fault -> the files it meets."""
HARMLESS = ("short", "slow")


class Case:
    """An engine of two ranks that has done a few steps, and its saver in some mode."""

    def __init__(self, recipe_file: str, folder: Path) -> None:
        self.folder = folder
        self.peers: Peers = start_process_group(World.from_env() or World(), DEVICE)
        self.recipe = load_recipe(recipe_file).recipe
        self.engine, self.state = begin(self.recipe, self.peers, seed=1)
        train_steps(self.recipe, self.peers, self.engine, self.state, 0, 1)

    def saver(self, name: str, mode: saver_module.Mode) -> Saver:
        return Saver(self.folder / name, self.peers, mode)

    def save(self, saver: Saver, step: int, **options: Any) -> None:
        saver.start(step, self.engine.module, self.state, {"plan": ""}, **options)


def fault_case(case: Case, mode: saver_module.Mode, fault: str, part: str) -> dict[str, Any]:
    """Save, save with a fault, save again; what became of it."""
    saver = case.saver(f"{mode}-{fault}-{part}", mode)
    run = case.folder / f"{mode}-{fault}-{part}"
    case.save(saver, 1, wait=True)
    faulty_disk.use(faulty_disk.FailingDisk(fault, part))
    message = ""
    try:
        case.save(saver, 2)
        # as at the ends of the next steps, until nothing is on its way
        while saver.in_flight:
            time.sleep(0.01)
            saver.advance(*case.peers.highest(saver.flags()))
    except CheckpointError as error:
        message = str(error)
    faulty_disk.use(Disk())
    case.peers.gather(None)
    whole = [folder.name for folder in checkpoint_folders(run) if not verify(folder)]
    left = sorted(path.name for path in (run / "checkpoints").glob(".*"))
    case.peers.gather(None)
    case.save(saver, 3, wait=True)
    case.peers.gather(None)
    again = [folder.name for folder in checkpoint_folders(run) if not verify(folder)]
    return {"message": message, "whole": whole, "left": left, "again": again}


def snapshot_case(case: Case) -> dict[str, Any]:
    """Change the state while a slow disk writes it, and ask for another save at once."""
    saver = case.saver("snapshot", "async")
    before = contents(case.state)
    faulty_disk.use(faulty_disk.FailingDisk("slow", "weight"))
    case.save(saver, 1)
    on_its_way = saver.in_flight and not checkpoint_folders(case.folder / "snapshot")
    train_steps(case.recipe, case.peers, case.engine, case.state, 1, 2)
    after = contents(case.state)
    case.save(saver, 2)
    first = [folder.name for folder in checkpoint_folders(case.folder / "snapshot")]
    saver.finish()
    faulty_disk.use(Disk())
    news = saver.take_news()
    return {
        "on_its_way": on_its_way,
        "first": first,
        "steps": [one.step for one in news],
        "stalls": [0 < one.stall <= one.seconds for one in news],
        "exact": [
            _holds(case, one.folder, values) for one, values in zip(news, (before, after), strict=True)
        ],
        "differ": any(not torch.equal(before[key], after[key]) for key in before),
    }


def _holds(case: Case, folder: Path, values: dict[str, torch.Tensor]) -> bool:
    reader = CheckpointReader(folder)
    state: TrainState = case.state
    return all(
        torch.equal(reader.read(kind, fragment), values[f"{kind}/{fragment.name}/{fragment.start}"])
        for kind in state.kinds
        for fragment, _ in state.tensors(kind)
    )


def slow_case(case: Case, said: list[str]) -> dict[str, Any]:
    """A rank whose disk is slow is named while the others wait."""
    saver_module.SLOW_SECONDS = 0.5
    saver = case.saver("slow", "async")
    if case.peers.world.rank == 1:
        faulty_disk.use(faulty_disk.FailingDisk("slow", "exp_avg"))
    case.save(saver, 1)
    saver.finish()
    faulty_disk.use(Disk())
    saver_module.SLOW_SECONDS = 60.0
    return {"said": said}


def room_case(case: Case) -> dict[str, Any]:
    """Where there is no memory for copies, training waits."""
    real: Callable[[], int] = saver_module.available_memory
    saver_module.available_memory = lambda: 1000
    saver = case.saver("room", "async")
    case.save(saver, 1)
    saver_module.available_memory = real
    return {"in_flight": saver.in_flight, "committed": [one.step for one in saver.take_news()]}


def nan_case(case: Case) -> dict[str, Any]:
    """A NaN on one rank ends the run at the next look, with its name."""
    saver = case.saver("nan", "async")
    fragment, values = next(iter(case.state.tensors("exp_avg")))
    if case.peers.world.rank == 1:
        values[0] = float("nan")
    try:
        case.save(saver, 1)
        saver.finish()
        message = ""
    except TrainingStopped as error:
        message = str(error)
    if case.peers.world.rank == 1:
        values[0] = 0.0
    name = case.peers.gather(fragment.name)[1]
    return {"message": message, "name": name, "left": len(list((case.folder / "nan/checkpoints").iterdir()))}


def closing_case(case: Case) -> dict[str, Any]:
    """A run ends with an error of its own while a save is failing on one rank."""
    saver = case.saver("closing", "async")
    faulty_disk.use(faulty_disk.FailingDisk("ENOSPC", "weight-00001"))
    case.save(saver, 1)
    try:
        saver.close(together=True)
        raised = ""
    except Exception as error:  # noqa: BLE001 - it would take the place of the error that ends the run
        raised = repr(error)
    faulty_disk.use(Disk())
    case.peers.gather(None)
    return {"raised": raised, "in_flight": saver.in_flight}


def all_cases(recipe_file: str, folder: str) -> int:
    """Run all cases and leave the results of this rank as JSON."""
    import logging

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("framework").addHandler(handler)
    case = Case(recipe_file, Path(folder))
    results: dict[str, Any] = {
        "snapshot": snapshot_case(case),
        "slow": slow_case(case, said),
        "room": room_case(case),
        "nan": nan_case(case),
        "closing": closing_case(case),
    }
    for fault, parts in CELLS.items():
        for number, part in enumerate(parts):
            mode: saver_module.Mode = "sync" if number % 3 == 2 else "async"
            results[f"{fault}-{part}"] = fault_case(case, mode, fault, part)
    (Path(folder) / f"rank-{case.peers.world.rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
    return 0
