"""Promises of the loader: the same batches for any number of ranks and workers, and after any stop."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import STEPS, batches_of, merged

from framework.data.loader import evaluation_batches, training_batches
from framework.data.randomness import sample_seed
from framework.data.sources import build_plan, open_sources
from framework.errors import CorruptSample, DataError, RecipeError
from framework.recipe.schema import Recipe
from framework.world import World

pytestmark = pytest.mark.usefixtures("no_worker_is_left_behind")


@pytest.fixture(scope="module")
def reference() -> Callable[[Recipe], Any]:
    made: dict[str, Any] = {}

    def get(recipe: Recipe) -> Any:
        if "steps" not in made:
            made["steps"] = merged(batches_of(recipe, World()))
        return made["steps"]

    return get


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_ranks_or_workers(
    ranks: int, workers: int, shards: Path, make_recipe: Callable, reference: Callable
) -> None:
    expected = reference(make_recipe(shards))
    recipe = make_recipe(shards, data={"workers": workers})
    parts = [batches_of(recipe, World(rank, ranks)) for rank in range(ranks)]
    assert all([batch.step for batch in part] == list(range(STEPS)) for part in parts)
    actual = merged([part[step] for step in range(STEPS) for part in parts])
    assert actual.keys() == expected.keys()
    for key, fields in expected.items():
        for field, tensor in fields.items():
            assert torch.equal(actual[key][field], tensor), (key, field)


def test_micro_batches_cut_the_same_step(shards: Path, make_recipe: Callable, reference: Callable) -> None:
    expected = reference(make_recipe(shards))
    batches = batches_of(make_recipe(shards, train={"accumulation": 4}), World())
    assert [(batch.step, batch.micro) for batch in batches[:5]] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    for key, fields in merged(batches).items():
        for field, tensor in fields.items():
            assert torch.equal(expected[key][field], tensor), (key, field)


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_any_step_gives_the_same_batches(
    workers: int, shards: Path, make_recipe: Callable, reference: Callable
) -> None:
    expected = reference(make_recipe(shards))
    actual = merged(batches_of(make_recipe(shards, data={"workers": workers}), World(), start=3))
    assert {step for step, _ in actual} == {3, 4}
    for key, fields in actual.items():
        for field, tensor in fields.items():
            assert torch.equal(expected[key][field], tensor), (key, field)


def test_shapes_labels_and_seeds(shards: Path, make_recipe: Callable) -> None:
    recipe = make_recipe(shards, image={"size": 48})
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    for batch in training_batches(recipe, sources, plan, World(1, 2), start_step=2, stop_step=4):
        assert set(batch.seconds) == {"read", "verify", "decode", "augment", "transfer"}
        assert batch.events == []
        share = plan.share(batch.step, rank=1, world=2, micro=0, accumulation=1)
        for name, shape in {"moves": (2, 3, 4, 32, 32), "stills": (4, 3, 1, 48, 48)}.items():
            group, opened = batch.groups[name], sources[name]
            assert (tuple(group.pixels.shape), group.pixels.dtype) == (shape, torch.uint8)
            assert group.pixels.is_contiguous(memory_format=torch.channels_last_3d)
            assert group.index.tolist() == share[name].index.tolist()
            for row, (epoch, index) in enumerate(
                zip(share[name].epoch.tolist(), share[name].index.tolist(), strict=True)
            ):
                info = opened.manifest.sample(int(opened.selection[index]))
                assert int(group.labels[row]) == info.label
                assert int(group.seeds[row]) % 2**64 == sample_seed(recipe.seed, name, epoch, index)


def test_the_same_sample_looks_different_in_another_epoch(shards: Path, make_recipe: Callable) -> None:
    recipe = make_recipe(shards, mixture={"moves": 10})
    batches = batches_of(recipe, World(), stop=2)
    views = [
        {int(i): p for i, p in zip(b.groups["moves"].index, b.groups["moves"].pixels, strict=True)}
        for b in batches
    ]
    assert views[0].keys() == views[1].keys() == set(range(10))
    assert not any(torch.equal(views[0][index], views[1][index]) for index in range(10))


def test_without_augmentation_pixels_are_those_of_the_file(
    shards: Path, media: list, make_recipe: Callable, helpers: Any
) -> None:
    plain = {"crop_area": (1.0, 1.0), "crop_ratio": (64 / 48, 64 / 48), "flip": 0.0}
    recipe = make_recipe(
        shards, mixture={"moves": 10}, video={"augment": plain, "clip": {"frames": 20, "stride": 1}}
    )
    group = batches_of(recipe, World(), stop=1)[0].groups["moves"]
    clips = [helpers.decode_all(medium.data)[0] for medium in media if medium.kind == "video"]
    for pixels, index in zip(group.pixels, group.index.tolist(), strict=True):
        whole = torch.from_numpy(clips[index]).permute(0, 3, 1, 2)
        small = torch.nn.functional.interpolate(whole, size=(32, 32), mode="bilinear", antialias=True)
        assert torch.equal(pixels, small.transpose(0, 1))


def test_ranks_that_do_not_divide(shards: Path, make_recipe: Callable) -> None:
    with pytest.raises(RecipeError, match="numbers of ranks work: 1, 2, 4"):
        batches_of(make_recipe(shards), World(0, 3))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_that_are_killed_or_stopped_meanwhile_change_no_batch(
    number: int, shards: Path, make_recipe: Callable, reference: Callable, helpers: Any
) -> None:
    expected = reference(make_recipe(shards))
    recipe = make_recipe(shards, data={"workers": 2, "prefetch": 1, "decode_seconds": 1.0})
    sources = open_sources(recipe)
    before = helpers.descendants()
    batches = training_batches(
        recipe, sources, build_plan(recipe, sources), World(), start_step=0, stop_step=STEPS
    )
    found = []
    for batch in batches:
        found.append(batch)
        if len(found) in (1, 3):
            workers = helpers.descendants(depth=2) - before
            os.kill(min(workers), number)
    actual = merged(found)
    assert actual.keys() == expected.keys()
    for key, fields in expected.items():
        for field, tensor in fields.items():
            assert torch.equal(actual[key][field], tensor), (key, field)


@pytest.fixture(scope="module")
def endless(shards: Path, media: list, tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """Shards with a picture whose bytes are right, and which takes minutes to decode."""
    bomb = helpers.scan_bomb()
    own = [replace(medium) for medium in media]
    (victim,) = [medium for medium in own if medium.key == "stills/005"]
    victim.data, victim.width, victim.height = bomb, 4000, 4000
    classes = {"moves": ["left", "right", "up"], "stills": ["a", "b", "c", "d"]}
    return helpers.write_shards(tmp_path_factory.mktemp("endless") / "shards", own, classes, per_shard=5)


def test_a_picture_that_takes_for_ever_is_replaced_by_its_substitute(
    endless: Path, make_recipe: Callable
) -> None:
    data = {"workers": 2, "decode_seconds": 1.0, "on_corrupt": "substitute"}
    batches = batches_of(make_recipe(endless, mixture={"stills": 4}, data=data), World(), stop=4)
    events = [event for batch in batches for event in batch.events]
    assert {event["key"] for event in events} == {"stills/005"}
    assert "costs data workers their lives: one hung for" in events[0]["reason"]
    fed = torch.cat([batch.groups["stills"].index for batch in batches]).tolist()
    assert 5 not in fed


def test_a_picture_that_takes_for_ever_stops_the_run_with_its_name(
    endless: Path, make_recipe: Callable
) -> None:
    recipe = make_recipe(endless, mixture={"stills": 4}, data={"workers": 1, "decode_seconds": 1.0})
    with pytest.raises(CorruptSample, match=r"one hung for \d s at decode, 2 in all .*key stills/005"):
        batches_of(recipe, World(), stop=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_stops_the_run_with_its_place(
    workers: int, damaged: Path, make_recipe: Callable
) -> None:
    with pytest.raises(
        CorruptSample, match=r"checksum .*source moves, shard shard-.*, key moves/006, offset \d+"
    ) as caught:
        batches_of(make_recipe(damaged, data={"workers": workers}), World())
    assert caught.value.key == "moves/006"


def test_substitutes_are_the_same_for_any_ranks_and_workers(damaged: Path, make_recipe: Callable) -> None:
    data = {"on_corrupt": "substitute"}
    recipe = make_recipe(damaged, data=data)
    whole = batches_of(recipe, World())
    events = [event for batch in whole for event in batch.events]
    assert len(events) == 2  # 20 clips of 10: two epochs
    plan = build_plan(recipe, open_sources(recipe))
    for event in events:
        assert (event["source"], event["key"], event["index"]) == ("moves", "moves/006", 6)
        assert event["substitute"] == plan.substitute("moves", event["epoch"], 6, 0) != 6
        assert "checksum" in event["reason"]
    parts = [
        batches_of(make_recipe(damaged, data={**data, "workers": 2}), World(rank, 2)) for rank in range(2)
    ]
    ordered = [part[step] for step in range(STEPS) for part in parts]
    assert [event for batch in ordered for event in batch.events] == events
    expected, actual = merged(whole), merged(ordered)
    for key, fields in expected.items():
        for field, tensor in fields.items():
            assert torch.equal(actual[key][field], tensor), (key, field)
    assert not any(6 in fields["index"] for (_, name), fields in expected.items() if name == "moves")


def test_good_samples_are_untouched_by_a_substitution(
    damaged: Path, shards: Path, make_recipe: Callable, reference: Callable
) -> None:
    expected = reference(make_recipe(shards))
    actual = merged(batches_of(make_recipe(damaged, data={"on_corrupt": "substitute"}), World()))
    changed = 0
    for key, fields in expected.items():
        same = fields["index"] == actual[key]["index"]
        changed += int((~same).sum())
        assert torch.equal(fields["pixels"][same], actual[key]["pixels"][same])
    assert changed == 2


def test_a_source_of_nothing_but_corrupt_samples(shards: Path, tmp_path: Path, make_recipe: Callable) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    for path in folder.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="all of its 16 substitutes are corrupt"):
        batches_of(make_recipe(folder, data={"on_corrupt": "substitute"}), World())


def test_bytes_that_verify_but_do_not_decode(tmp_path: Path, helpers: Any, make_recipe: Callable) -> None:
    medium = helpers.image_medium("stills/0", "stills", 0, helpers.moving_frames(1, 32, 32)[0])
    medium.data = medium.data[: len(medium.data) // 3]
    folder = helpers.write_shards(tmp_path / "shards", [medium], {"stills": ["a", "b", "c", "d"]}, 1)
    with pytest.raises(CorruptSample, match=r"does not decode: .*key stills/0"):
        batches_of(make_recipe(folder, mixture={"stills": 1}), World())


def test_no_room_in_shared_memory_is_an_error_and_no_hang(shards: Path, make_recipe: Callable) -> None:
    recipe = make_recipe(shards, data={"workers": 1}, video={"size": 64})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))  # a clip of 64 pixels takes 49,152 bytes
    try:
        with pytest.raises(DataError, match=r"no memory for pixels of .* bytes \(0\.2 MB: .*File too large"):
            batches_of(recipe, World())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_every_sample_once(
    ranks: int, workers: int, shards: Path, make_recipe: Callable
) -> None:
    for name, opened in open_sources(make_recipe(shards)).items():
        parts = [
            list(
                evaluation_batches(
                    opened, World(rank, ranks), temporal_views=2, spatial_views=3, batch=3, workers=workers
                )
            )
            for rank in range(ranks)
        ]
        assert len({len(part) for part in parts}) == 1
        batches = [batch for part in parts for batch in part]
        views = (6, 3, 4) if name == "moves" else (1, 3, 1)
        assert {tuple(batch.pixels.shape) for batch in batches} == {(3, *views, 32, 32)}
        valid = torch.cat([batch.valid for batch in batches])
        index = torch.cat([batch.index for batch in batches])
        assert sorted(index[valid].tolist()) == list(range(len(opened)))
        assert (index[~valid] == -1).all()
        assert not torch.cat([batch.pixels for batch in batches])[~valid].any()
        labels = torch.cat([batch.labels for batch in batches])[valid].tolist()
        samples = [opened.manifest.sample(int(opened.selection[i])) for i in index[valid].tolist()]
        assert labels == [sample.label for sample in samples]


def test_views_of_a_video(shards: Path, media: list, helpers: Any, make_recipe: Callable) -> None:
    opened = open_sources(make_recipe(shards, video={"size": 48}))["moves"]
    batch = next(
        iter(evaluation_batches(opened, World(), temporal_views=3, spatial_views=3, batch=1, workers=0))
    )
    frames = helpers.decode_all(next(medium.data for medium in media if medium.kind == "video"))[0]
    starts, lefts = (0, 6, 13), (0, 8, 16)  # 20 frames hold 14 places of 7; 64 pixels hold 17 of 48
    for number, view in enumerate(batch.pixels[0]):
        start, left = starts[number // 3], lefts[number % 3]
        expected = torch.from_numpy(frames[start : start + 7 : 2, :, left : left + 48]).permute(3, 0, 1, 2)
        assert torch.equal(view, expected)


def test_shuffled_frames_are_the_same_frames_in_another_order(shards: Path, make_recipe: Callable) -> None:
    opened = open_sources(make_recipe(shards, video={"clip": {"frames": 8, "stride": 2}}))["moves"]

    def pixels(shuffle: bool, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        batches = evaluation_batches(
            opened,
            World(rank, ranks),
            temporal_views=1,
            spatial_views=1,
            batch=1,
            workers=0,
            shuffle_frames=shuffle,
        )
        return torch.cat([batch.pixels for batch in batches])[:, 0].transpose(
            1, 2
        )  # (samples, frames, 3, h, w)

    plain, shuffled = pixels(False), pixels(True)
    orders = set()
    for before, after in zip(plain, shuffled, strict=True):
        order = [next(i for i in range(8) if torch.equal(before[i], frame)) for frame in after]
        assert sorted(order) == list(range(8))
        orders.add(tuple(order))
    assert len(orders) > 5
    assert torch.equal(shuffled[1::2], pixels(True, 1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_a_corrupt_sample(workers: int, damaged: Path, make_recipe: Callable) -> None:
    opened = open_sources(make_recipe(damaged))["moves"]
    with pytest.raises(CorruptSample, match="moves/006"):
        list(evaluation_batches(opened, World(), temporal_views=1, spatial_views=1, batch=4, workers=workers))


def test_stills_of_videos_are_an_image_source(
    shards: Path, media: list, make_recipe: Callable, helpers: Any
) -> None:
    plain = {"crop_area": (1.0, 1.0), "crop_ratio": (64 / 48, 64 / 48), "flip": 0.0, "randaugment": None}
    stills = {"dataset": "moves", "classes": 3, "augment": plain, "still": "center"}
    recipe = make_recipe(shards, mixture={"stills": 10}, image=stills)
    group = batches_of(recipe, World(), stop=1)[0].groups["stills"]
    clips = [helpers.decode_all(medium.data)[0] for medium in media if medium.kind == "video"]
    assert sorted(group.index.tolist()) == list(range(10))
    for pixels, index in zip(group.pixels, group.index.tolist(), strict=True):
        frame = torch.from_numpy(clips[index][10:11]).permute(0, 3, 1, 2)
        small = torch.nn.functional.interpolate(frame, size=(32, 32), mode="bilinear", antialias=True)
        assert torch.equal(pixels, small.transpose(0, 1))
    opened = open_sources(recipe)["stills"]
    (batch,) = evaluation_batches(opened, World(), temporal_views=4, spatial_views=3, batch=10, workers=0)
    assert tuple(batch.pixels.shape) == (10, 1, 3, 1, 32, 32)
    random = make_recipe(shards, mixture={"stills": 10}, image={**stills, "still": "random"})
    changed = batches_of(random, World(), stop=1)[0].groups["stills"].pixels
    assert not torch.equal(changed, group.pixels)
