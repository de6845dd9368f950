"""The sources of a recipe, opened and checked before any GPU time is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from framework.data.datasets import DatasetInfo, rows_of, targets_problem
from framework.data.manifest import MANIFEST_NAME, Manifest
from framework.data.plan import Plan, PlanSource
from framework.data.table import Selection
from framework.data.urls import place_of
from framework.errors import DataError
from framework.recipe.cache_section import Cache
from framework.recipe.schema import Recipe, Source
from framework.targets import TargetSpec, in_words
from framework.wording import counted

__all__ = ["OpenSource", "Split", "build_plan", "open_sources"]

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class OpenSource:
    """A source with its manifest; `selection` holds the places of its samples in the manifest, ascending."""

    name: str
    source: Source
    manifest: Manifest
    dataset: DatasetInfo
    selection: Selection | NDArray[np.int64]
    split: Split = "train"

    def __len__(self) -> int:
        return len(self.selection)

    @property
    def identity(self) -> str:
        """A hash of the manifest and of what was selected from it."""
        text = f"{self.manifest.hash}\n{self.dataset.name}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def keys(self, index: NDArray[np.int64]) -> list[str]:
        """Sample keys at places of the selection."""
        return [str(self.manifest.sample(int(place)).key) for place in self.selection[index]]


def open_sources(recipe: Recipe, split: Split = "train") -> dict[str, OpenSource]:
    """Open the sources of the mixture; for "validation" those that have held-out shards.

    Errors:
        DataError: a folder without a manifest, shards that are missing or short, a table that was changed, a
            data set that is not there, or classes, labels, frames or rates that do not fit the recipe.
    """
    opened = {}
    for name in recipe.data.mixture:
        source = recipe.data.sources[name]
        folder = source.path if split == "train" else source.validation
        if folder is not None:
            opened[name] = _open_source(name, source, folder, split, recipe.data.cache)
    return opened


def build_plan(recipe: Recipe, sources: Mapping[str, OpenSource]) -> Plan:
    """The plan of a run over its training sources.

    Errors:
        DataError: a source of the mixture is not among `sources`.
    """
    missing = [name for name in recipe.data.mixture if name not in sources]
    if missing:
        raise DataError(f"sources of the mixture that were not opened: {', '.join(missing)}")
    return Plan(
        [_plan_source(sources[name], count) for name, count in recipe.data.samples.items()],
        seed=recipe.seed,
        block=recipe.data.block,
    )


def _plan_source(opened: OpenSource, count: int) -> PlanSource:
    summary = opened.manifest.summaries.get(opened.dataset.name)
    if summary is not None:
        sizes = summary.shards
    else:
        shards = opened.manifest.column("shard")[np.asarray(opened.selection)]
        sizes = np.bincount(shards, minlength=len(opened.manifest.shards)).astype(np.int64)
    return PlanSource(opened.name, count, sizes, opened.identity, opened.source.repeats)


def _open_source(name: str, source: Source, folder: str, split: Split, cache: Cache) -> OpenSource:
    manifest = Manifest.open(folder, cache)
    manifest.check_table()
    dataset = manifest.find(source.dataset, name, source.media)
    selection = manifest.selection(source.dataset, name, source.media)
    opened = OpenSource(name, source, manifest, dataset, selection, split)
    _check_classes(opened)
    if split == "validation":
        _check_same_classes(opened, source.path, cache)
    _check_media(opened)
    return opened


def _where(opened: OpenSource) -> str:
    return f"source {opened.name}: data set {opened.dataset.name!r} in {opened.manifest.folder}"


def _check_classes(opened: OpenSource) -> None:
    if len(opened) == 0:
        raise DataError(f"{_where(opened)} holds no samples; shard it anew, or leave it out of data.mixture")
    told, asked = opened.dataset.targets, opened.source.targets
    if told != asked:
        raise DataError(
            f"{_where(opened)} has {in_words(told)}, the recipe says {in_words(asked)}: "
            f"set {_settings(f'data.sources.{opened.name}', told)}, or point the source to the right shards"
        )
    if told.kind != "single":
        _check_targets(opened)
        return
    found = len(opened.dataset.classes)
    summary = opened.manifest.summaries.get(opened.dataset.name)
    if summary is not None:
        low, high = summary.label_range
    else:
        labels = opened.manifest.column("label")[np.asarray(opened.selection)]
        low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= found:
        raise DataError(
            f"{_where(opened)} has labels from {low} to {high}, but {counted(found, 'class')}: "
            "the manifest contradicts itself; shard the data anew"
        )


def _settings(key: str, targets: TargetSpec) -> str:
    """The overrides by which a source says these targets."""
    if targets.kind == "heads":
        heads = ", ".join(f"{name}: {size}" for name, size in zip(targets.names, targets.sizes, strict=True))
        return f"'{key}.heads={{{heads}}}' (and no {key}.classes)"
    return f"{key}.classes={targets.outputs} {key}.target={targets.kind}".removesuffix(
        f" {key}.target=single"
    )


def _check_targets(opened: OpenSource) -> None:
    problem = None
    lengths, values = rows_of(*opened.manifest.targets(), np.asarray(opened.selection))
    kinds = opened.manifest.column("dataset").astype(np.int64)
    problem = targets_problem(opened.manifest.datasets, kinds, *opened.manifest.targets())
    if problem is None and opened.dataset.heads and len(values) and int(values.min()) < 0:
        unknown = int(np.flatnonzero(values < 0)[0]) // len(opened.dataset.heads)
        key = opened.manifest.sample(int(opened.selection[unknown])).key
        problem = f"sample {key} has no class for one of its heads"
    if problem is None and not lengths.any():
        problem = "no sample has any class"
    if problem:
        raise DataError(f"{_where(opened)}: {problem}; shard the data anew")


def _check_same_classes(opened: OpenSource, training: str, cache: Cache) -> None:
    """Label n must mean the same class in both folders; a folder that is not here cannot be compared."""
    place = place_of(training)
    if isinstance(place, Path) and not (place / MANIFEST_NAME).exists():
        return
    trained = Manifest.open(place, cache).find(opened.source.dataset, opened.name, opened.source.media)
    lists = zip(trained.class_lists, opened.dataset.class_lists, strict=False)
    for head, (before, after) in enumerate(lists):
        of_head = f" of {opened.dataset.heads[head].name}" if opened.dataset.heads else ""
        for label, (one, other) in enumerate(zip(before, after, strict=False)):
            if one != other:
                raise DataError(
                    f"{_where(opened)}: label {label}{of_head} is {other!r}, but {one!r} in the training "
                    f"shards {training}: shard both splits with the same list of classes"
                )


def _check_media(opened: OpenSource) -> None:
    summary, clip = opened.manifest.summaries.get(opened.dataset.name), opened.source.clip
    by_rate = clip is not None and clip.fps is not None
    if summary is not None and summary.fewest_frames > 0 and not (by_rate and summary.unknown_fps):
        return
    manifest, selection = opened.manifest, np.asarray(opened.selection)
    frames = manifest.column("frames")[selection]
    if int(frames.min()) < 1:
        key = manifest.sample(int(selection[int(frames.argmin())])).key
        raise DataError(f"{_where(opened)}: sample {key} has no decodable frame; shard the data anew")
    if by_rate:
        fps = manifest.column("fps")[selection]
        bad = np.flatnonzero(~(np.isfinite(fps) & (fps > 0)))
        if len(bad):
            key = manifest.sample(int(selection[bad[0]])).key
            raise DataError(
                f"{_where(opened)}: the manifest has no rate (fps) of {counted(len(bad), 'sample')}, {key} "
                f"for one: take frames by data.sources.{opened.name}.clip.stride instead of clip.fps"
            )
