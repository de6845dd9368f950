"""Megatron-Energon and MosaicML Streaming as contenders of benchmarks.loader, each in a process of its own.

    PYTHON -m benchmarks.other_loaders versions
    PYTHON -m benchmarks.other_loaders prepare NAME SHARDS FOLDER
    PYTHON -m benchmarks.other_loaders serve NAME FOLDER
    PYTHON -m benchmarks.other_loaders check NAME SHARDS FOLDER [--clips 8]

PYTHON is that of the environment which `make other-loaders` makes. It has another torch than this project and
little of what `framework` needs, so nothing of `framework` is imported here. `prepare` makes a data set of
the loader's own kind from the tars of `tubeworks data shard`. `serve` answers each line of stdin, a number of
clips, with one line of JSON: the processor seconds that they took in all threads, and the bytes of memory
that the process has for itself. `check`, to be run by hand, compares clips with those of a decoder that
starts at the first frame.

Both make what every contender makes: 32 frames with stride 2 from a random place, a random crop of 224x224,
batches of one, without workers of their own. Neither shuffles, which would only keep more files in memory.

Megatron-Energon reads the same tars by its own index, as a crude data set with a cooker. Its task encoder
asks its `AVDecoder.get_clips` for 32 ranges of one frame each, by frame number: it decodes from the key frame
before the first, and converts to RGB only what was asked for. One range from the first to the last gives the
same frames, but converts those in between as well, and takes a fifth to a third longer.

MosaicML Streaming reads the same files from a bytes column of its own shards. It has no video decoder, so it
is given the usual one: PyAV from the start of the file to the last wanted frame.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch

ENERGON, STREAMING = "Megatron-Energon", "MosaicML Streaming"
PACKAGES = {ENERGON: "megatron-energon", STREAMING: "mosaicml-streaming", "av": "av", "torch": "torch"}
FILM_FRAMES, FRAMES, STRIDE, SIZE = 300, 32, 2, 224
CROP_AREA, CROP_RATIO, TRIES = (0.25, 1.0), (0.75, 1.3333), 10
EPOCH = 100_000
"""Clips of an epoch of Streaming: many, because one of four films would measure the start of epochs."""


class Choice(NamedTuple):
    """What chance decides of a clip: its first frame, and the crop in pixels."""

    start: int
    top: int
    left: int
    height: int
    width: int


class Made(NamedTuple):
    """A clip, (batch, frames, height, width, 3), and what it was made of."""

    key: str
    choice: Choice
    pixels: torch.Tensor


def random_frames() -> list[int]:
    """The frames of a clip, from a place where it fits."""
    start = random.randrange(FILM_FRAMES - (FRAMES - 1) * STRIDE)
    return list(range(start, start + FRAMES * STRIDE, STRIDE))


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop, distributed as those of this project's loader are."""
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for _ in range(TRIES):
        area = random.uniform(*CROP_AREA) * height * width
        ratio = math.exp(random.uniform(low, high))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if box_height <= height and box_width <= width:
            top, left = random.randrange(height - box_height + 1), random.randrange(width - box_width + 1)
            return top, left, box_height, box_width
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    box_height, box_width = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resize(frames: torch.Tensor) -> torch.Tensor:
    """Bilinear with antialiasing: (n, height, width, 3) to (n, 224, 224, 3), channels last all the way."""
    planes = frames.permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1)


def sequential(data: bytes, wanted: Sequence[int]) -> np.ndarray:
    """The wanted frames, decoded from the start: (n, height, width, 3)."""
    frames, chosen = [], set(wanted)
    with av.open(io.BytesIO(data)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                frames.append(frame.to_ndarray(format="rgb24"))
            if index >= wanted[-1]:
                break
    return np.stack(frames)


def crop(frames: np.ndarray, box: Sequence[int]) -> torch.Tensor:
    """A crop of frames, 224x224."""
    top, left, height, width = box
    part = frames[:, top : top + height, left : left + width]
    return resize(torch.from_numpy(np.ascontiguousarray(part)))


def films_in(shards: Path) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of the videos in all tars of a folder."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".mp4") and (file := tar.extractfile(member)) is not None:
                    yield Path(member.name).stem, file.read()


def prepare_energon(shards: Path, folder: Path) -> None:
    """Energon's index beside a copy of the tars."""
    folder.mkdir(parents=True)
    for path in shards.glob("*.tar"):
        shutil.copy(path, folder)
    command = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive"]
    command += ["--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0"]
    command += ["--sample-type", "CrudeWebdataset", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def energon_clips(folder: Path) -> Iterator[Made]:
    """Clips from Energon's loader."""
    # Imported here, so that the memory of a loader does not count with that of the other.
    energon: Any = importlib.import_module("megatron.energon")

    @energon.edataclass
    class Film(energon.Sample):
        video: Any

    @energon.edataclass
    class Clip(energon.Sample):
        choice: torch.Tensor
        pixels: torch.Tensor

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Film:
        return Film(**energon.basic_sample_keys(sample), video=sample["mp4"])

    class Encoder(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(cook),)

        @energon.stateless(restore_seeds=True)
        def encode_sample(self, sample: Film) -> Clip:
            choice, pixels = energon_clip(sample.video)
            return Clip.derive_from(sample, choice=torch.tensor(choice), pixels=pixels)

    dataset = energon.get_train_dataset(
        str(folder),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    for batch in energon.get_loader(dataset):
        yield Made(batch.__key__[0], Choice(*batch.choice[0].tolist()), batch.pixels)


def energon_clip(video: Any) -> tuple[Choice, torch.Tensor]:
    """A random clip from Energon's decoder, and what was chosen."""
    wanted = random_frames()
    data = video.get_clips(video_clip_ranges=[(frame, frame) for frame in wanted], video_unit="frames")
    frames = [clip.permute(0, 2, 3, 1) for clip in data.video_clips]  # as they lie: (1, height, width, 3)
    top, left, height, width = box = random_box(*frames[0].shape[1:3])
    part = torch.cat([frame[:, top : top + height, left : left + width] for frame in frames])
    return Choice(wanted[0], *box), resize(part)


def prepare_streaming(shards: Path, folder: Path) -> None:
    """Streaming's shards with the files of the tars."""
    streaming: Any = importlib.import_module("streaming")
    with streaming.MDSWriter(out=str(folder), columns={"key": "str", "mp4": "bytes"}) as writer:
        for key, data in films_in(shards):
            writer.write({"key": key, "mp4": data})


def streaming_clips(folder: Path) -> Iterator[Made]:
    """Clips from torch's loader of a Streaming data set."""
    streaming: Any = importlib.import_module("streaming")

    class Clips(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> dict[str, Any]:
            film = super().__getitem__(at)
            wanted = random_frames()
            frames = sequential(film["mp4"], wanted)
            box = random_box(*frames.shape[1:3])
            choice = torch.tensor([wanted[0], *box])
            return {"key": film["key"], "choice": choice, "pixels": crop(frames, box)}

    dataset: Any = Clips(local=str(folder), batch_size=1, epoch_size=EPOCH)
    while True:
        for batch in torch.utils.data.DataLoader(dataset, batch_size=1):
            yield Made(batch["key"][0], Choice(*batch["choice"][0].tolist()), batch["pixels"])


PREPARE: dict[str, Callable[[Path, Path], None]] = {ENERGON: prepare_energon, STREAMING: prepare_streaming}
CLIPS: dict[str, Callable[[Path], Iterator[Made]]] = {ENERGON: energon_clips, STREAMING: streaming_clips}


def own_memory() -> int:
    """Bytes of memory that this process has for itself."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_bytes().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    """Versions of the loaders, of PyAV and of torch.

    Errors:
        SystemExit: one of them is not installed.
    """
    found, missing = {}, []
    for name, package in PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    return found


def serve(name: str, folder: Path) -> None:
    """Make as many clips as each line of stdin says, and answer what they took; "ready" comes first."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the loaders print is no answer
    torch.set_num_threads(1)
    clips = CLIPS[name](folder)
    next(clips)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        started = time.process_time()
        for _ in range(int(line)):
            next(clips)
        answer = {"seconds": time.process_time() - started, "memory": own_memory()}
        print(json.dumps(answer), file=answers, flush=True)


def check(name: str, shards: Path, folder: Path, count: int) -> None:
    """Compare clips with those from the first frame on.

    Errors:
        SystemExit: one of them differs.
    """
    films, clips = dict(films_in(shards)), CLIPS[name](folder)
    for _ in range(count):
        key, choice, pixels = next(clips)
        wanted = range(choice.start, choice.start + FRAMES * STRIDE, STRIDE)
        expected = crop(sequential(films[Path(key).name], wanted), choice[1:])
        if not torch.equal(pixels[0], expected):
            raise SystemExit(f"{name}: {key}, {choice}: not the wanted frames")
        print(f"{key}: {choice}: exact")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions")
    for command, folders in {
        "prepare": ("shards", "folder"),
        "serve": ("folder",),
        "check": ("shards", "folder"),
    }.items():
        part = commands.add_parser(command)
        part.add_argument("name", choices=CLIPS)
        for folder in folders:
            part.add_argument(folder, type=Path)
    commands.choices["check"].add_argument("--clips", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.command == "versions":
        print(json.dumps(versions()))
    elif arguments.command == "prepare":
        PREPARE[arguments.name](arguments.shards, arguments.folder)
    elif arguments.command == "serve":
        serve(arguments.name, arguments.folder)
    else:
        check(arguments.name, arguments.shards, arguments.folder, arguments.clips)


if __name__ == "__main__":
    main()
