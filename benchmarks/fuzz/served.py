"""Shards of others with strange members, indexed where they lie, and then trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks.fuzz.campaigns import Medium, Outcome, one_epoch, recipe_of, same, write_folder
from benchmarks.fuzz.strange import GOOD, INTRUDER, Strange, strange_shards
from data_tools.indexing import IndexOptions, index_shards
from data_tools.readers import display
from data_tools.report import ShardReport
from data_tools.verify import verify
from framework.data.samples import SampleReader
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.errors import TubeworksError
from framework.recipe.schema import Recipe

__all__ = ["served_shards"]


def served_shards(folder: Path, count: int, seed: int) -> list[Outcome]:
    """The index takes the good samples alone, names the strange one, and training gets their pixels."""
    rng = np.random.default_rng(seed)
    media = [Medium(key, False, data, "png") for key, data in GOOD.items()]
    pristine = open_sources(_pictures(write_folder(folder / "pristine", media)))["stills"]
    outcomes = []
    for number, strange in enumerate(strange_shards(rng, count)):
        work = folder / f"{number:05d}"
        work.mkdir()
        (work / "set.tar").write_bytes(strange.data)
        try:
            report = index_shards(IndexOptions(work, "stills", "image"))
            said = " ".join(f"{failure.key}: {failure.reason}" for failure in report.failed)
            outcome = _judge(work, strange, report, pristine)
        except TubeworksError as error:
            outcome, said = "refused", str(error)
            if strange.whole:
                outcome = "WRONG: a strange member cost the whole shard"
        if any(folder.rglob("*.png")) or Path("/absolute").exists():
            outcome = "WRONG: a file was written outside"
        outcomes.append(Outcome("served shards", strange.what, f"shard {number}", outcome, said[-160:]))
        shutil.rmtree(work)
    return outcomes


def _pictures(folder: Path) -> Recipe:
    recipe = recipe_of(folder, workers=0)
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"mixture": {"stills": len(GOOD)}})}
    )


def _judge(folder: Path, strange: Strange, report: ShardReport, pristine: OpenSource) -> str:
    if strange.whole and report.written != len(GOOD):
        return f"WRONG: {report.written} samples are indexed, {len(GOOD)} are good"
    named = {failure.key for failure in report.failed}
    if not strange.whole and report.written < len(GOOD) and not named:
        return "WRONG: samples are lost without a word"
    if any(display(key) not in named for key in strange.refused):
        return "WRONG: the strange sample is not named in the report"
    if not report.written:
        return "refused"
    if problems := verify(folder, decode=True).problems:
        return f"WRONG: verify finds {problems[0]}"
    recipe = _pictures(folder)
    sources = open_sources(recipe)
    reader, whole = SampleReader(sources["stills"]), SampleReader(pristine)
    places = {whole.info(index).key: index for index in range(len(pristine))}
    reasons, served = one_epoch(recipe, sources, build_plan(recipe, sources))
    if reasons:
        return f"WRONG: an indexed sample is corrupt: {reasons}"
    for (_, index), rows in served.items():
        info = reader.info(index)
        data = (folder / info.shard).read_bytes()[info.offset : info.offset + info.length]
        if data == INTRUDER or info.key not in places or not same(whole, places[info.key], rows):
            return f"WRONG: {info.key} is not what was put there"
    return "refused" if report.failed else "harmless"
