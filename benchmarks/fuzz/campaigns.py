"""What is done with damaged inputs, and what must never come of it: a hang, a crash, or a wrong sample."""

from __future__ import annotations

import io
import shutil
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.fuzz.damage import (
    BROKEN,
    DAMAGES,
    FRAMES,
    HEIGHT,
    IN_PLACE,
    WIDTH,
    clips,
    pictures,
    scan_bomb,
)
from benchmarks.fuzz.strange import strange_archives
from data_tools.importers.folder import collect_folder
from data_tools.items import inventory
from data_tools.sharding import ShardOptions, shard
from framework.data.loader import training_batches
from framework.data.manifest import DatasetInfo, Manifest, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.data.plan import Plan
from framework.data.samples import SampleReader
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.errors import CorruptSample, TubeworksError
from framework.files import hash_file
from framework.recipe.schema import Recipe
from framework.world import World

__all__ = ["Outcome", "archives", "bytes_in_shards", "decoders", "files", "tables"]


@dataclass(frozen=True)
class Outcome:
    """What became of a damaged input: refused by name, harmless (the right sample came), or wrong."""

    campaign: str
    damage: str
    name: str
    outcome: str
    said: str = ""


@dataclass
class Medium:
    """A sample to be written into a shard as it is, however damaged."""

    key: str
    video: bool
    data: bytes
    extension: str
    damage: str = ""


def write_folder(folder: Path, media: list[Medium]) -> Path:
    """One shard of the media and a manifest that vouches for every byte; sizes are those of whole media."""
    folder.mkdir(parents=True)
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for medium in media:
            info = tarfile.TarInfo(f"{medium.key}.{medium.extension}")
            info.size = len(medium.data)
            tar.addfile(info, io.BytesIO(medium.data))
    with tarfile.open(path) as tar:
        offsets = [member.offset_data for member in tar]
    video = np.array([medium.video for medium in media])
    columns: dict[str, Any] = {
        "key": [medium.key for medium in media],
        "shard": np.zeros(len(media), np.uint32),
        "offset": offsets,
        "length": [len(medium.data) for medium in media],
        "crc32": [zlib.crc32(medium.data) for medium in media],
        "dataset": (~video).astype(np.uint16),
        "kind": video.astype(np.uint8),
        "label": np.arange(len(media)) % 4,
        "width": np.full(len(media), WIDTH),
        "height": np.full(len(media), HEIGHT),
        "frames": np.where(video, FRAMES, 1),
        "fps": np.where(video, 25.0, 0.0),
        "keyframes": [list(range(0, FRAMES, 6)) if medium.video else [] for medium in media],
        "extension": [medium.extension for medium in media],
    }
    counts = int(video.sum()), int((~video).sum())
    names = tuple("abcd")
    datasets = [
        DatasetInfo("moves", "train", "video", names, counts[0]),
        DatasetInfo("stills", "train", "image", names, counts[1]),
    ]
    shards = [ShardInfo(path.name, path.stat().st_size, hash_file(path), len(media))]
    write_manifest(folder, columns, shards, datasets)
    return folder


def recipe_of(folder: Path, *, decode_seconds: float = 30.0, workers: int = 2) -> Recipe:
    """A recipe over such a folder that replaces what is corrupt."""
    shared = {"path": str(folder), "size": 32, "classes": 4}
    return Recipe.model_validate(
        {
            "name": "fuzz",
            "model": {"name": "tubevit_ti"},
            "data": {
                "sources": {
                    "moves": {**shared, "kind": "video", "clip": {"frames": 4, "stride": 2}},
                    "stills": {**shared, "kind": "image"},
                },
                "mixture": {"moves": 4, "stills": 4},
                "workers": workers,
                "decode_seconds": decode_seconds,
                "on_corrupt": "substitute",
                "max_corrupt": 1_000_000,
            },
            "optimizer": {"lr": 0.001},
            "train": {"steps": 10},
        }
    )


def _media(count: int, damaged: float, rng: np.random.Generator) -> list[Medium]:
    """Clips and pictures in turn, of which a share has damage that a manifest vouches for."""
    whole = {True: clips(8), False: pictures(14)}
    media = []
    for number in range(count):
        video = number % 2 == 0
        extension, data = whole[video][number // 2 % len(whole[video])]
        damage = ""
        if rng.random() < damaged:
            damage = str(rng.choice(list(DAMAGES)))
            data = DAMAGES[damage](data, rng)
        media.append(Medium(f"fuzz/{number:05d}", video, data, extension, damage))
    return media


def one_epoch(
    recipe: Recipe, sources: dict[str, OpenSource], plan: Plan
) -> tuple[dict[str, str], dict[tuple[str, int], list[tuple[int, torch.Tensor]]]]:
    """Reasons by key, and what was served: (source, index) -> [(seed, pixels)], of at least one epoch."""
    steps = max(-(-len(opened) // plan.counts[name]) for name, opened in sources.items())
    reasons: dict[str, str] = {}
    served: dict[tuple[str, int], list[tuple[int, torch.Tensor]]] = {}
    for batch in training_batches(recipe, sources, plan, World(), start_step=0, stop_step=steps):
        for event in batch.events:
            reasons[event["key"]] = event["reason"]
        for name, group in batch.groups.items():
            for index, seed, pixels in zip(
                group.index.tolist(), group.seeds.tolist(), group.pixels, strict=True
            ):
                served.setdefault((name, index), []).append((seed % 2**64, pixels))
    return reasons, served


def same(reader: SampleReader, index: int, rows: list[tuple[int, torch.Tensor]]) -> bool:
    """Whether all that was served of a sample is what whole shards give for the same seed."""
    info = reader.info(index)
    return all(
        torch.equal(pixels, torch.from_numpy(reader.training_views(info, [seed])[0]).permute(3, 0, 1, 2))
        for seed, pixels in rows
    )


def bytes_in_shards(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Bytes that changed after sharding: what is served must be the pixels of the whole shards."""
    rng = np.random.default_rng(seed)
    whole = write_folder(folder / "whole", _media(count, 0.0, rng))
    hurt = Path(shutil.copytree(whole, folder / "hurt"))
    manifest = Manifest.open(hurt)
    damages: dict[str, str] = {}
    with (hurt / manifest.shards[0].name).open("r+b") as file:
        for index in range(len(manifest)):
            sample = manifest.sample(index)
            damage = str(rng.choice([*IN_PLACE, "tar header"])) if rng.random() < 0.5 else "none"
            damages[sample.key] = damage
            start, length = sample.offset, sample.length
            if damage == "tar header":
                start, length = sample.offset - 512, 512
            file.seek(start)
            data = file.read(length)
            if damage != "none":
                file.seek(start)
                file.write(IN_PLACE.get(damage, IN_PLACE["bits flipped"])(data, rng))
    recipe = recipe_of(hurt)
    sources = open_sources(recipe)
    pristine = open_sources(recipe_of(whole))
    reasons, served = one_epoch(recipe, sources, build_plan(recipe, sources))
    outcomes = []
    for name, opened in sources.items():
        reader = SampleReader(pristine[name])
        for index in range(len(opened)):
            key = reader.info(index).key
            rows = served.get((name, index), [])
            if rows and not same(reader, index, rows):
                outcome = "WRONG: other pixels than those that were sharded"
            elif key in reasons:
                outcome = "refused"
            else:
                outcome = "harmless" if rows else "WRONG: lost without a word"
            if damages[key] == "none" and outcome != "harmless":
                outcome = "WRONG: a good sample was refused"
            if damages[key] != "none" or outcome.startswith("WRONG"):
                said = reasons.get(key, "")[:160]
                outcomes.append(Outcome("bytes in shards", damages[key], key, outcome, said))
    return outcomes


def decoders(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Media that were damaged before they were sharded: decoders must survive; good samples stay right."""
    rng = np.random.default_rng(seed)
    media = _media(count, 0.75, rng)
    for number, (damage, (extension, make)) in enumerate(BROKEN.items()):
        media.append(Medium(f"broken/{number:03d}", extension == "mp4", make(), extension, damage))
    media.append(Medium("broken/bomb", False, scan_bomb(scans=4_000), "jpg", "a JPEG of 4,000 scans"))
    shards = write_folder(folder / "shards", media)
    recipe = recipe_of(shards, decode_seconds=4.0)
    sources = open_sources(recipe)
    reasons, served = one_epoch(recipe, sources, build_plan(recipe, sources))
    places = {medium.key: medium for medium in media}
    outcomes = []
    for name, opened in sources.items():
        reader = SampleReader(opened)
        for index in range(len(opened)):
            medium = places[reader.info(index).key]
            rows = served.get((name, index), [])
            outcome = (
                "refused" if medium.key in reasons else "decoded" if rows else "WRONG: lost without a word"
            )
            if not medium.damage:
                good = outcome == "decoded" and same(reader, index, rows)
                if good:
                    continue
                outcome = "WRONG: a good sample was refused or changed"
            said = reasons.get(medium.key, "")[:160]
            outcomes.append(Outcome("decoders", medium.damage, medium.key, outcome, said))
    return outcomes


def files(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Damaged files in class folders: the report names what is left out, the shards verify and decode."""
    rng = np.random.default_rng(seed)
    outcomes = []
    for kind, whole in (("video", clips(8)), ("image", pictures(14))):
        root = folder / kind
        damages: dict[str, str] = {}
        for number in range(count // 2):
            extension, data = whole[number % len(whole)]
            damage = "none" if number % 5 == 0 else str(rng.choice(list(DAMAGES)))
            data = data if damage == "none" else DAMAGES[damage](data, rng)
            damages[f"{'ab'[number % 2]}/{number:04d}.{extension}"] = damage
            _put(root, f"{'ab'[number % 2]}/{number:04d}.{extension}", data)
        for number, (damage, (extension, make)) in enumerate(BROKEN.items()):
            if (extension == "mp4") == (kind == "video"):
                damages[f"a/broken-{number}.{extension}"] = damage
                _put(root, f"a/broken-{number}.{extension}", make())
        collection = collect_folder(root, "fuzz", split="train", kind="video" if kind == "video" else "image")
        report = shard(inventory([collection]), ShardOptions(folder / f"{kind}-shards", workers=2))
        refused = {failure.reason.rsplit("(", 1)[-1].rstrip(")"): failure.reason for failure in report.failed}
        outcomes += _judge_files(root, folder / f"{kind}-shards", damages, refused)
    return outcomes


def _put(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _judge_files(root: Path, shards: Path, damages: dict[str, str], refused: dict[str, str]) -> list[Outcome]:
    """Every file is either in the shards, byte by byte and decodable, or named in the report."""
    manifest = Manifest.open(shards)
    held: Counter[bytes] = Counter()
    for index in range(len(manifest)):
        sample = manifest.sample(index)
        with (shards / sample.shard).open("rb") as file:
            file.seek(sample.offset)
            held[file.read(sample.length)] += 1
    outcomes = []
    for name, damage in damages.items():
        data = (root / name).read_bytes()
        if name in refused:
            outcome = "refused" if damage != "none" else "WRONG: a good file was refused"
        else:
            outcome = "harmless" if held[data] else "WRONG: neither sharded nor named"
        if damage != "none" or outcome.startswith("WRONG"):
            outcomes.append(Outcome("files", damage, name, outcome, refused.get(name, "")[:160]))
    return outcomes


def archives(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Archives with names that climb out, links, devices, damaged headers, and ends that are missing."""
    outcomes = []
    rng = np.random.default_rng(seed)
    for number, strange in enumerate(strange_archives(rng, count)):
        work = folder / f"{number:05d}"
        work.mkdir(parents=True)
        (work / "set.tar").write_bytes(strange.data)
        name, said = f"archive {number}", ""
        try:
            collection = collect_folder(work / "set.tar" / "set", "fuzz", split="train", kind="image")
            report = shard(inventory([collection]), ShardOptions(work / "shards"))
            named = " ".join(f"{failure.key}: {failure.reason}" for failure in report.failed)
            inside = [one for one in strange.refused if one.startswith("set/")]
            outcome = "refused" if report.failed else "harmless"
            if any(one.removeprefix("set/") not in named for one in inside):
                outcome = "WRONG: a strange member is not named in the report"
            said = named[:160]
        except TubeworksError as error:
            outcome, said = "refused", str(error)[-160:]
            if strange.whole:
                outcome = "WRONG: a strange member cost the whole archive"
        strangers = [path for path in folder.rglob("*") if path.name in ("climbed.png", "rooted.png")]
        if strangers or Path("/absolute").exists():
            outcome = "WRONG: a file was written outside"
        outcomes.append(Outcome("archives", strange.what, name, outcome, said))
        shutil.rmtree(work)
    return outcomes


def tables(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Shards cut short, tables and manifests changed: an error with a name before the first step."""
    rng = np.random.default_rng(seed)
    whole = write_folder(folder / "whole", _media(40, 0.0, rng))
    targets = [(path, path.read_bytes()) for path in sorted(whole.iterdir())]
    outcomes = []
    for number in range(count):
        target, data = targets[number % len(targets)]
        damage = "truncated" if target.suffix == ".tar" else str(rng.choice(list(DAMAGES)))
        hurt = DAMAGES[damage](data, rng)
        target.write_bytes(hurt)
        try:
            sources = open_sources(recipe_of(whole))
            outcome, said = ("harmless" if hurt == data else "WRONG: opened as if nothing had happened"), ""
            assert sources
        except CorruptSample as error:
            outcome, said = "refused", str(error)
        except TubeworksError as error:
            outcome, said = (
                ("refused" if target.name in str(error) else "WRONG: the file is not named"),
                str(error),
            )
        outcomes.append(Outcome("tables", damage, f"{target.name} {number}", outcome, said[-160:]))
        target.write_bytes(data)
    return outcomes


def silent_libraries() -> None:
    """FFmpeg speaks of every damaged file; the report does, too."""
    av.logging.set_level(av.logging.PANIC)
