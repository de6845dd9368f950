"""TubeViT-H for real on two CPU ranks: two steps with ZeRO-3, a checkpoint, a kill, a resume, memory.

    python benchmarks/train_h_on_cpu.py [--out DIR] [--result FILE]

Takes the recipe `tubevit_h_k400_in1k` as it is, but for its global batch, its number of steps, and shards of
synthetic clips and images with all 400 and 1000 classes. The run is killed with SIGKILL after its first
checkpoint and started again. Needs about 20 GiB of memory, 20 GiB of disk, and patience.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import describe_machine

GIB = 2**30
CLIPS, IMAGES = 4, 4
LIMIT_SECONDS = 3600


def main() -> None:
    """Make the shards, train, kill, resume, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where shards and run go; by default a temporary folder")
    parser.add_argument("--result", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = options.out or Path(temporary)
        shards = make_shards(home)
        figures = measure(home / "run", shards)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.result:
        options.result.write_text(text + "\n", encoding="utf-8")


def make_shards(home: Path) -> Path:
    """Noise as clips and images, in class folders with the recipe's numbers of classes."""
    import av
    from PIL import Image

    random = np.random.default_rng(0)
    out = home / "shards"
    if out.exists():
        return out
    for name, classes in (("k400", 400), ("in1k", 1000)):
        for label in range(classes):
            (home / name / f"class_{label:04d}").mkdir(parents=True, exist_ok=True)
    for number in range(CLIPS):
        path = home / "k400" / f"class_{number * 97:04d}" / f"clip_{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=15)
            stream.width, stream.height, stream.pix_fmt = 320, 256, "yuv420p"
            for _ in range(96):
                coarse = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(coarse.repeat(8, 0).repeat(8, 1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    for number in range(IMAGES):
        path = home / "in1k" / f"class_{number * 211:04d}" / f"image_{number}.jpg"
        Image.fromarray(random.integers(0, 256, (256, 320, 3), dtype=np.uint8)).save(path)
    inputs = [f"{name}=folder:input={home / name}" for name in ("k400", "in1k")]
    tubeworks("data", "shard", "mix", "--input", inputs[0], "--input", inputs[1], "--out", str(out)).wait()
    return out


def measure(run: Path, shards: Path) -> dict[str, Any]:
    """Train to the first checkpoint, kill, train to the end."""
    command = [
        "train", "tubevit_h_k400_in1k", "--ranks", "2", "--run", str(run),
        *(f"data.sources.{name}.path={shards}" for name in ("k400", "in1k")),
        *(f"data.sources.{name}.validation=null" for name in ("k400", "in1k")),
        "data.mixture.k400=2", "data.mixture.in1k=2", "data.workers=1", "data.prefetch=1",
        "train.steps=2", "train.log_every=1", "schedule.warmup=1", "checkpoint.every=1",
        "tracking.mlflow=false",
    ]  # fmt: skip
    first = run_watched(command, until=run / "checkpoints" / "step-00000001" / "MANIFEST.json")
    second = run_watched(command, until=None)
    entries = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    losses = {e["step"]: e["metrics"]["train/loss"] for e in entries if "train/loss" in e["metrics"]}
    seconds = {e["step"]: e["metrics"]["perf/step_s"] for e in entries if "perf/step_s" in e["metrics"]}
    saves = [e["metrics"]["checkpoint/save_s"] for e in entries if "checkpoint/save_s" in e["metrics"]]
    newest = max((run / "checkpoints").glob("step-*"))
    return {
        "command": "tubeworks " + " ".join(command).replace(str(run.parent), "DIR"),
        "machine": {
            **describe_machine(),
            "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        },
        "loss_by_step": losses,
        "seconds_by_step": seconds,
        "checkpoint_save_seconds": saves,
        "checkpoint_gib": round(sum(f.stat().st_size for f in newest.iterdir()) / GIB, 2),
        "peak_memory_gib": {
            "first attempt, killed after step 1": first,
            "second attempt, from step 1 to 2": second,
        },
    }


def run_watched(command: list[str], until: Path | None) -> float:
    """Run to its end, or kill all its processes once a file is there; returns the peak memory in GiB.

    Memory is the sum of the proportional set sizes of all processes, so shared pages count once.
    """
    process = tubeworks(*command)
    peak = Peak(process.pid)
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            sys.exit(f"no end after {LIMIT_SECONDS} s")
        if until is not None and until.exists():
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.1)
    if until is None and process.returncode:
        sys.exit(f"training failed with exit code {process.returncode}")
    return peak.stop()


class Peak:
    """Samples the memory of a process and its children until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """End sampling; the peak in GiB."""
        self._stop.set()
        self._thread.join()
        return round(self._peak / GIB, 2)

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            total = 0
            try:
                for process in [self._process, *self._process.children(recursive=True)]:
                    total += proportional_bytes(process.pid)
            except (psutil.Error, OSError):  # one of them has just ended
                continue
            self._peak = max(self._peak, total)


def proportional_bytes(pid: int) -> int:
    """A process's memory, shared pages divided by those who share them, as Linux sums it up."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def tubeworks(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own."""
    return subprocess.Popen([sys.executable, "-m", "launch.cli", *arguments], start_new_session=True)


if __name__ == "__main__":
    main()
