"""Promises of `repeats`: views of one sample, read once, that stay together on any ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import STEPS, batches_of, merged

from framework.data.ledger import Ledger
from framework.data.randomness import sample_seed
from framework.data.shards import ShardReader
from framework.data.sources import build_plan, open_sources
from framework.errors import RecipeError
from framework.world import World

pytestmark = pytest.mark.usefixtures("no_worker_is_left_behind")

REPEATED = {"mixture": {"moves": 8, "stills": 8}, "video": {"repeats": 2}, "image": {"repeats": 4}}


@pytest.mark.parametrize(("ranks", "workers", "accumulation"), [(1, 2, 1), (2, 0, 1), (1, 0, 2)])
def test_repeated_samples_are_views_of_one_sample_on_any_ranks(
    ranks: int, workers: int, accumulation: int, shards: Path, make_recipe: Callable
) -> None:
    whole = merged(batches_of(make_recipe(shards, **REPEATED), World()))
    recipe = make_recipe(shards, **REPEATED, data={"workers": workers}, train={"accumulation": accumulation})
    parts = [batches_of(recipe, World(rank, ranks)) for rank in range(ranks)]
    many = accumulation
    ordered = [
        batch for step in range(STEPS) for part in parts for batch in part[step * many : (step + 1) * many]
    ]
    actual = merged(ordered)
    assert actual.keys() == whole.keys()
    plan, seen = build_plan(recipe, open_sources(recipe)), {"moves": [], "stills": []}
    for (step, name), fields in whole.items():
        for field, tensor in fields.items():
            assert torch.equal(actual[step, name][field], tensor), (step, name, field)
        repeats = recipe.data.sources[name].repeats
        ids = plan.of_step(name, step)
        assert fields["index"].tolist() == ids.index.repeat(repeats).tolist()
        seen[name] += fields["index"][::repeats].tolist()
        seeds = [
            sample_seed(recipe.seed, name, epoch, index, view)
            for epoch, index in zip(ids.epoch.tolist(), ids.index.tolist(), strict=True)
            for view in range(repeats)
        ]
        assert [seed % 2**64 for seed in fields["seeds"].tolist()] == seeds
        for first in range(0, len(fields["index"]), repeats):
            views = fields["pixels"][first : first + repeats]
            assert len({view.numpy().tobytes() for view in views}) == repeats
    assert sorted(seen["moves"]) == sorted([*range(10), *range(10)])  # two epochs: 5 steps of 4 of 10 clips
    assert len(seen["stills"]) == len(set(seen["stills"])) == 10


def test_views_of_a_sample_do_not_depend_on_how_many_there_are(shards: Path, make_recipe: Callable) -> None:
    once = merged(batches_of(make_recipe(shards, mixture={"moves": 4, "stills": 2}), World()))
    often = merged(batches_of(make_recipe(shards, **REPEATED), World()))
    for key, fields in once.items():
        repeats = 2 if key[1] == "moves" else 4
        for field, tensor in fields.items():
            assert torch.equal(often[key][field][::repeats], tensor), (key, field)


def test_a_sample_is_read_and_decoded_once_for_all_its_views(
    shards: Path, make_recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    reading = ShardReader.read

    def counted(self: ShardReader, sample: Any) -> bytes:
        read.append(sample.key)
        return reading(self, sample)

    monkeypatch.setattr(ShardReader, "read", counted)
    (batch,) = batches_of(make_recipe(shards, **REPEATED), World(), stop=1)
    assert len(read) == len(set(read)) == 4 + 2
    assert sum(len(group.index) for group in batch.groups.values()) == 16


def test_all_views_of_a_corrupt_sample_are_of_one_substitute(damaged: Path, make_recipe: Callable) -> None:
    recipe = make_recipe(damaged, **REPEATED, data={"on_corrupt": "substitute"})
    batches = batches_of(recipe, World())
    events = [event for batch in batches for event in batch.events]
    assert [event["key"] for event in events] == ["moves/006"] * 2  # once an epoch, whatever the views
    seeds: set[int] = set()
    for batch in batches:
        group = batch.groups["moves"]
        assert (group.index.view(-1, 2) == group.index.view(-1, 2)[:, :1]).all()
        seeds |= set(group.seeds.tolist())
        ledger = Ledger(batch.step)
        ledger.note(batch.step, "moves", 0, group.epoch, group.planned, group.index, repeats=2)
        replaced = ledger.take(batch.step + 1)["sources"]["moves"]["replaced"]
        assert len(replaced) == len([event for event in batch.events if event["source"] == "moves"])
    assert len(seeds) == 5 * 8, "the substitute's views are others than those that it has in its own place"


def test_repeats_that_would_straddle_ranks_or_micro_batches(shards: Path, make_recipe: Callable) -> None:
    recipe = make_recipe(shards, mixture={"moves": 8}, video={"repeats": 4})
    with pytest.raises(RecipeError, match=r"moves: 8 \(2 samples, each in one .* ranks work: 1, 2\."):
        batches_of(recipe, World(0, 4))
    with pytest.raises(ValueError, match=r"moves\.repeats\): 8 or 12 would do"):
        make_recipe(shards, mixture={"moves": 10}, video={"repeats": 4})
