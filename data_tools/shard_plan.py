"""The plan of a sharding run, on disk: which items make which shard. Any process that sees it can make one.

A plan lies in `OUT.partial`: `plan.json` says what is made and how, `items.jsonl` has the items of one shard
in each line. The shards, and a record of each, come to lie beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.items import DatasetPlan, Failure, Inventory, Item
from data_tools.presets import Preset
from data_tools.readers import reader_from_json, reader_to_json
from framework.data.datasets import HeadInfo
from framework.errors import DataError
from framework.files import replace_file, replace_text

__all__ = ["ITEMS_NAME", "PLAN_NAME", "ShardPlan", "adopt", "cut", "open_plan", "staging_of", "write_plan"]

PLAN_NAME = "plan.json"
ITEMS_NAME = "items.jsonl"
_FORMAT = "tubeworks-shard-plan"
_LAYOUT = 2
"""Raised when the same items would give other bytes."""


@dataclass(frozen=True)
class ShardPlan:
    """What is to be made in the staging folder `folder`.

    `digest` stands for all that decides the bytes; `shards` has the offset and length (bytes) of each line
    of `items.jsonl`, and the number of its items.
    """

    folder: Path
    digest: str
    preset: Preset
    datasets: tuple[DatasetPlan, ...]
    missing: tuple[str, ...]
    failed: tuple[Failure, ...]
    shards: tuple[tuple[int, int, int], ...]

    @property
    def samples(self) -> int:
        """Items of all shards."""
        return sum(items for _, _, items in self.shards)

    def items(self, number: int) -> list[Item]:
        """The items of one shard, in their order."""
        offset, length, _ = self.shards[number]
        with (self.folder / ITEMS_NAME).open("rb") as file:
            file.seek(offset)
            line = file.read(length)
        return [self._item(values) for values in json.loads(line)]

    def _item(self, values: Sequence[Any]) -> Item:
        key, dataset, label, class_name, source, reader, targets, names, segment, about = values
        return Item(
            key, dataset, self.datasets[dataset].kind, label, class_name, source, reader_from_json(reader),
            tuple(targets), tuple(names) if isinstance(names, list) else names,
            tuple(segment) if segment else None, about,
        )  # fmt: skip


def staging_of(out: Path) -> Path:
    """The folder in which the shards of `out` are made."""
    return out.with_name(out.name + ".partial")


def cut(items: Sequence[Item], seed: int, samples: int, megabytes: int) -> list[list[Item]]:
    """Items in their random order, cut where a shard is full."""
    key = seed.to_bytes(8, "little", signed=True)

    def place(item: Item) -> bytes:
        return hashlib.blake2b(item.key.encode(), key=key, digest_size=16).digest()

    limit = megabytes * 2**20
    count = max(1, math.ceil(len(items) / samples), math.ceil(sum(item.size for item in items) / limit))
    length = math.ceil(len(items) / count)  # shards of equal length keep all workers busy to the end
    shards: list[list[Item]] = []
    size = 0
    for item in sorted(items, key=place):
        if not shards or len(shards[-1]) >= length or size + item.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards


def write_plan(
    folder: Path, inventory: Inventory, shards: Sequence[Sequence[Item]], preset: Preset
) -> ShardPlan:
    """Write the plan's two files under temporary names (`.new`); `adopt` gives them their names."""
    digest = hashlib.blake2b(digest_size=16)
    datasets = [asdict(dataset) for dataset in inventory.datasets]
    digest.update(json.dumps([_LAYOUT, asdict(preset), datasets]).encode())
    places: list[tuple[int, int, int]] = []

    def write(file: BinaryIO) -> None:
        for items in shards:
            line = json.dumps([_values(item) for item in items]).encode() + b"\n"
            digest.update(line)
            places.append((file.tell(), len(line), len(items)))
            file.write(line)

    replace_file(folder / (ITEMS_NAME + ".new"), write)
    plan = ShardPlan(
        folder, digest.hexdigest(), preset, inventory.datasets, inventory.missing, inventory.failed,
        tuple(places),
    )  # fmt: skip
    content = {
        "format": _FORMAT,
        "version": _LAYOUT,
        "digest": plan.digest,
        "preset": asdict(preset),
        "datasets": datasets,
        "missing": plan.missing,
        "failed": [asdict(failure) for failure in plan.failed],
        "shards": plan.shards,
    }
    replace_text(folder / (PLAN_NAME + ".new"), json.dumps(content))
    return plan


def adopt(folder: Path) -> None:
    """Make the plan that `write_plan` wrote the plan of the folder."""
    for name in (ITEMS_NAME, PLAN_NAME):
        (folder / (name + ".new")).replace(folder / name)


def open_plan(folder: Path) -> ShardPlan:
    """The plan in a staging folder; DataError if there is none, or one of another version."""
    path = folder / PLAN_NAME
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT or content["version"] != _LAYOUT:
            raise DataError(f"{path}: made by another version of tubeworks; plan the shards anew")
        return ShardPlan(
            folder,
            content["digest"],
            Preset(**content["preset"]),
            tuple(_dataset(values) for values in content["datasets"]),
            tuple(content["missing"]),
            tuple(Failure(**failure) for failure in content["failed"]),
            tuple((offset, length, items) for offset, length, items in content["shards"]),
        )
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no shards are planned here; plan them first: `tubeworks data shard … --plan-only`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); plan the shards anew") from error


def _dataset(values: dict[str, Any]) -> DatasetPlan:
    heads = tuple(HeadInfo(head["name"], tuple(head["classes"])) for head in values.pop("heads"))
    return DatasetPlan(**{**values, "classes": tuple(values["classes"])}, heads=heads)


def _values(item: Item) -> list[Any]:
    return [
        item.key, item.dataset, item.label, item.class_name, item.source, reader_to_json(item.reader),
        item.targets, item.target_names, item.segment, item.about,
    ]  # fmt: skip
