"""How long training stands still for a checkpoint, saved in the background and not, and what it takes back.

    python -m benchmarks.checkpoint [--width 1024] [--depth 24] [--rounds 3] [--out DIR] [--result FILE]

A TubeViT of more than 300 million parameters on one CPU rank (ZeRO-1, fp32), with Adam's moments filled with
numbers. No step is trained: between the looks that training takes at the end of a step the main thread
sleeps. Memory: about 28 bytes a parameter. The disk is that of DIR, by default the temporary folder's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe_machine

if TYPE_CHECKING:
    from framework.training.distributed import Peers
    from framework.training.state import Fragment, TrainState

RECIPE = """\
name: big
model: {{name: tubevit_l, width: {width}, depth: {depth}, heads: 16, mlp_width: {mlp}}}
data:
  sources:
    clips: {{path: {home}, kind: video, classes: 400, size: 224, clip: {{frames: 32, stride: 2}}}}
  mixture: {{clips: 1}}
optimizer: {{lr: 1e-3}}
train: {{steps: 10}}
engine: {{zero: 1, precision: fp32}}
"""
STEP_SECONDS = 0.05


def main() -> None:
    """Build, save, restore, consolidate, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind")
    parser.add_argument("--out", type=Path, help="where checkpoints go; by default a temporary folder")
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = options.out or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        figures = measure(home, options.width, options.depth, options.rounds)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.result:
        options.result.write_text(text + "\n", encoding="utf-8")


def measure(home: Path, width: int, depth: int, rounds: int) -> dict[str, Any]:
    """All figures; seconds and bytes."""
    from framework.training.checkpoint import CheckpointReader
    from framework.training.checkpoint_manifest import verify

    peers, engine, state = started(home, width, depth)
    saves = saved(home, rounds, peers, engine, state)
    folder = home / "async" / "checkpoints" / f"step-{rounds:08d}"
    began = time.perf_counter()
    problems = verify(folder)
    verified = time.perf_counter()
    reader = CheckpointReader(folder)
    reader.load_into(engine.module)
    state.restore(reader.read, reader.kinds, 1)
    restored = time.perf_counter()
    assert not problems
    return {
        "command": f"python -m benchmarks.checkpoint --width {width} --depth {depth} --rounds {rounds}",
        "machine": describe_machine(),
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "kinds": sorted(reader.kinds),
        "saves": saves,
        "note": "the first asynchronous save also takes the memory for the copies; later ones fill it again",
        "verify_s": round(verified - began, 3),
        "load_s": round(restored - verified, 3),
        "consolidate": consolidated(folder, home / "all.safetensors"),
    }


def started(home: Path, width: int, depth: int) -> tuple[Peers, Any, TrainState]:
    """One rank's engine with its model, and Adam's moments filled with numbers."""
    import torch

    from framework.models.registry import build_model, inputs_of
    from framework.recipe import load_recipe
    from framework.training.distributed import start_process_group
    from framework.training.engine import start_engine
    from framework.training.state import TrainState
    from framework.world import World

    path = home / "big.yaml"
    path.write_text(RECIPE.format(width=width, depth=depth, mlp=4 * width, home=home), encoding="utf-8")
    recipe = load_recipe(str(path)).recipe
    peers = start_process_group(World(), torch.device("cpu"))
    engine = start_engine(build_model(recipe.model, inputs_of(recipe)), recipe, peers.world)
    state = TrainState(engine, None)

    def numbers(kind: str, fragment: Fragment) -> torch.Tensor:
        return torch.full((fragment.count,), float(len(kind)))

    state.restore(numbers, {"weight", "exp_avg", "exp_avg_sq"}, 1)
    return peers, engine, state


def saved(
    home: Path, rounds: int, peers: Peers, engine: Any, state: TrainState
) -> dict[str, list[dict[str, float]]]:
    """Seconds of every save, and of standing still for it; both kinds by turns, the last of each stays."""
    from framework.training.saver import Saver

    savers = {mode: Saver(home / mode, peers, mode) for mode in ("sync", "async")}
    saves: dict[str, list[dict[str, float]]] = {"sync": [], "async": []}
    for step in range(1, rounds + 1):
        for mode, saver in savers.items():
            saver.start(step, engine.module, state, {"plan": ""})
            while saver.in_flight:
                time.sleep(STEP_SECONDS)
                saver.advance(*peers.highest(saver.flags()))
            (done,) = saver.take_news()
            saves[mode].append({"stall_s": round(done.stall, 3), "save_s": round(done.seconds, 3)})
            if step > 1:
                shutil.rmtree(home / mode / "checkpoints" / f"step-{step - 1:08d}")
    return saves


def consolidated(folder: Path, target: Path) -> dict[str, Any]:
    """Seconds and peak memory of the command, beside what it takes for a file that is not there."""
    peaks, seconds = [], 0.0
    for source in (folder.with_name("nowhere"), folder):
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from framework.errors import CheckpointError\n"
            "from framework.training.consolidate import consolidate\n"
            "try:\n    consolidate(Path(sys.argv[1]), Path(sys.argv[2]))\n"
            "except CheckpointError:\n    pass\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        began = time.perf_counter()
        command = [sys.executable, "-c", code, str(source), str(target)]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout) * 1024)
        seconds = time.perf_counter() - began
    size = target.stat().st_size
    return {"seconds": round(seconds, 3), "bytes": size, "memory_bytes": peaks[1] - peaks[0]}


if __name__ == "__main__":
    main()
