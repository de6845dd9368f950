"""Who takes part in benchmarks.loader, and the films that they all take their clips from.

This loader, the bare decode loop and stock webdataset run in the process that asks; the loaders of another
environment, in benchmarks.other_loaders, in processes of their own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import webdataset
from PIL import Image

from benchmarks.other_loaders import ENERGON, FILM_FRAMES, FRAMES, STREAMING, STRIDE, sequential
from framework.data.augment import random_box, resize
from framework.data.clips import random_clip
from framework.data.loader import training_batches
from framework.data.manifest import Manifest
from framework.data.randomness import Draws, sample_seed
from framework.data.sources import build_plan, open_sources
from framework.data.video import VideoRequest, decode_video
from framework.recipe.schema import Augment, Clip, Recipe
from framework.world import World

COUNT, RATE, SIZE = FILM_FRAMES, 30, (1280, 720)
CLIP = Clip(frames=FRAMES, stride=STRIDE)
AUGMENT = Augment()
PRESETS = ("archive", "balanced", "fast")
OTHERS = (ENERGON, STREAMING)
PLANNED = 4096
GOODBYE = 20.0
ROOT = Path(__file__).absolute().parents[1]
HINT = "`make other-loaders` makes an environment that has what is needed"
Clips = Iterator[np.ndarray]


def film(seed: int, size: tuple[int, int], count: int) -> bytes:
    """A film of a soft pattern under a moving camera, with a patch of noise that crosses it."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 12, width // 12, 3), dtype=np.uint8)
    pattern = np.asarray(
        Image.fromarray(coarse).resize((width + 200, height + 200), Image.Resampling.BICUBIC)
    )
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            top, left = (int(100 + 90 * f(number / 45)) for f in (np.cos, np.sin))
            frame = pattern[top : top + height, left : left + width].copy()
            column, side = number * 5 % (width - width // 8), width // 8
            frame[side : 2 * side, column : column + side] = rng.integers(0, 255, (side, side, 3))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def make_shards(folder: Path, films: Sequence[bytes], presets: Sequence[str]) -> None:
    """Class folders of the films, and shards of them with each preset."""
    source = folder / "films" / "one"
    source.mkdir(parents=True)
    for number, data in enumerate(films):
        (source / f"{number:03d}.mp4").write_bytes(data)
    for preset in presets:
        command = [sys.executable, "-m", "launch.cli", "data", "shard", "folder", "--workers", "1"]
        command += ["--input", str(source.parent), "--name", "clips", "--preset", preset]
        subprocess.run([*command, "--out", str(folder / preset)], check=True, stdout=subprocess.DEVNULL)


def recipe_of(
    folder: Path, repeats: int = 1, clips: int = 1_000_000, workers: int = 0, batch: int = 1
) -> Recipe:
    """So many videos a step from the shards of a folder, by default one, with so many views of each."""
    source = {
        "path": str(folder),
        "kind": "video",
        "classes": 1,
        "clip": CLIP.model_dump(),
        "repeats": repeats,
    }
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"name": "tubevit_ti"},
            "data": {"sources": {"clips": source}, "mixture": {"clips": batch * repeats}, "workers": workers},
            "optimizer": {"lr": 0.001},
            "train": {"steps": clips},
        }
    )


def product(
    folder: Path, repeats: int = 1, clips: int = 1_000_000, workers: int = 0, batch: int = 1
) -> Clips:
    """This loader: plan, checksum, decode, crop, flip, batch."""
    recipe = recipe_of(folder, repeats, clips, workers, batch)
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    batches = training_batches(recipe, sources, plan, World(), start_step=0, stop_step=clips)
    for made in batches:
        yield made.groups["clips"].pixels.numpy()


def stock_webdataset(folder: Path) -> Clips:
    """What is usual: webdataset's own reader, PyAV from the start of the file to the last wanted frame."""
    total = int(Manifest.open(folder).column("frames").min())
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    reader = cast(Any, webdataset).WebDataset  # it fills its namespace when it is imported
    stream = reader(shards, shardshuffle=False, empty_check=False).to_tuple("mp4").repeat()
    for number, (data,) in enumerate(stream):
        draws = Draws(number, "benchmark")
        yield crop(sequential(data, random_clip(CLIP, total, RATE, draws)), draws)


def crop(frames: np.ndarray, draws: Draws) -> np.ndarray:
    """A random crop of frames, 224x224."""
    box = random_box(draws, frames.shape[1], frames.shape[2], AUGMENT)
    part = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return resize(np.ascontiguousarray(part), 224)


def bare_loop(folder: Path) -> Clips:
    """The limit: this project's decoder and crop on files in memory, and nothing else.

    It makes the very clips of `product`, in its order, all decided before the first one; it flips none.
    """
    files, requests = planned(folder)
    for place, request in itertools.cycle(requests):
        yield np.concatenate([resize(chunk, 224) for _, chunk in decode_video(files[place], request)])


def planned(folder: Path) -> tuple[list[bytes], list[tuple[int, VideoRequest]]]:
    """All files, and what the first steps take from which."""
    recipe = recipe_of(folder)
    sources = open_sources(recipe)
    plan, manifest = build_plan(recipe, sources), sources["clips"].manifest
    infos = [manifest.sample(int(index)) for index in sources["clips"].selection]
    requests = []
    for step in range(PLANNED):
        ids = plan.share(step, rank=0, world=1, micro=0, accumulation=1)["clips"]
        place = int(ids.index[0])
        info, seed = infos[place], sample_seed(recipe.seed, "clips", int(ids.epoch[0]), place, 0)
        wanted = random_clip(CLIP, info.frames, info.fps, Draws(seed, "clip"))
        box = random_box(Draws(seed, "crop"), info.height, info.width, AUGMENT)
        keys = info.keyframes.tolist()
        requests.append((place, VideoRequest(wanted, info.frames, info.height, info.width, keys, box)))
    return [films_in(folder, info) for info in infos], requests


def films_in(folder: Path, info: Any) -> bytes:
    """The bytes of one sample."""
    with (folder / info.shard).open("rb") as file:
        file.seek(info.offset)
        return file.read(info.length)


class OtherLoader:
    """A loader of another environment, in a process of its own that makes clips when it is asked.

    Errors:
        RuntimeError: the process has ended; why stands in its own words on stderr.
    """

    def __init__(self, python: Path, name: str, folder: Path) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [*_command(python), "serve", name, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()  # its start takes seconds, and would run beside the turns of the rest

    def __enter__(self) -> OtherLoader:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # it has nothing more to do, and removes its shared memory
        try:
            self._process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def processor_time(self, count: int) -> float:
        """Processor seconds per clip, of all threads of that process."""
        return self._ask(count)["seconds"] / count

    def memory(self, count: int) -> float:
        """MB that the process has for itself after so many clips."""
        return round(self._ask(count)["memory"] / 1e6, 1)

    def _ask(self, count: int) -> dict[str, float]:
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} has ended with {self._process.wait()}")
        return line


def other_versions(python: Path) -> dict[str, str]:
    """Versions of the loaders in another environment, and of what they decode and resize with.

    Errors:
        SystemExit: the interpreter does not start, or its environment lacks one of them.
    """
    try:
        done = subprocess.run(
            [*_command(python), "versions"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise SystemExit(f"--others {python}: {error.strerror}; {HINT}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise SystemExit(f"--others {python}: {reason}; {HINT}")
    return json.loads(done.stdout)


def prepare_other(python: Path, name: str, shards: Path, folder: Path) -> None:
    """Make the data set of another environment's loader from shards."""
    subprocess.run([*_command(python), "prepare", name, str(shards), str(folder)], cwd=ROOT, check=True)


def _command(python: Path) -> list[str]:
    return [str(python.absolute()), "-m", "benchmarks.other_loaders"]  # a venv's link must not be resolved
