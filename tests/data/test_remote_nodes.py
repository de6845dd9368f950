"""Promises of training from a store: the same batches, little traffic, and a bad store costs no sample."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.data.loader import Batch, training_batches
from framework.data.prefetch import NodeFuture, cache_needed, check_cache
from framework.data.sources import build_plan, open_sources
from framework.errors import DataError, RecipeError
from framework.recipe.schema import Recipe
from framework.world import World

SAMPLES, PER_SHARD, BATCH = 192, 2, 8
STEPS = 2 * SAMPLES // BATCH


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """96 shards of two pictures of noise each."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SAMPLES, 56, 64, 3), dtype=torch.uint8, generator=rng).numpy()
    media = [helpers.image_medium(f"s/{n:04d}", "stills", n % 4, pixels[n]) for n in range(SAMPLES)]
    folder = tmp_path_factory.mktemp("remote") / "stills"
    return helpers.write_shards(folder, media, {"stills": ["a", "b", "c", "d"]}, per_shard=PER_SHARD)


def recipe_for(path: str, folder: Path, **changes: Any) -> Recipe:
    """Pictures of 16 pixels, eight a step; `changes` go into `data`."""
    source = {"path": path, "kind": "image", "classes": 4, "size": 16}
    data = {
        "sources": {"stills": source},
        "mixture": {"stills": BATCH},
        "block": 6,
        "workers": 0,
        "cache": {"folder": str(folder), "stall_seconds": 0.5, "patience_seconds": 30},
    }
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"name": "tubevit_ti"},
            "data": data | changes,
            "optimizer": {"lr": 0.001},
            "train": {"steps": STEPS},
        }
    )


def with_limit(recipe: Recipe, limit: float) -> Recipe:
    cache = recipe.data.cache.model_copy(update={"gib": limit / 2**30})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": cache})})


@contextmanager
def batches_of(recipe: Recipe, world: World = World()) -> Iterator[Iterator[Batch]]:
    sources = open_sources(recipe)
    plan = build_plan(recipe, sources)
    check_cache(recipe, sources, {}, plan, world)
    batches = training_batches(recipe, sources, plan, world, start_step=0, stop_step=recipe.train.steps)
    try:
        yield batches
    finally:
        batches.close()


def contents(batches: Iterator[Batch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for batch in batches:
        assert batch.events == []  # nothing was replaced
        found.append((batch.groups["stills"].index, batch.groups["stills"].pixels))
    return found


@pytest.fixture(scope="module")
def local(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with batches_of(recipe_for(str(stills), tmp_path_factory.mktemp("none"))) as batches:
        return contents(batches)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("faults", [{}, {"fail": 20, "stall": 100, "cut": 50}], ids=["good", "failing"])
def test_four_nodes_fetch_the_data_set_once_an_epoch(
    faults: dict[str, int],
    stills: Path,
    local: list[tuple[torch.Tensor, torch.Tensor]],
    flaky: Any,
    tmp_path: Path,
) -> None:
    """Each node has room for its share and a little more; all that comes over the wire counts."""
    total, served = folder_bytes(stills), flaky.Faults(**faults)
    parts = []
    with flaky.file_server(stills, served) as url:
        for node in range(4):
            recipe = with_limit(recipe_for(url, tmp_path / f"node{node}"), 0.4 * total)
            with batches_of(recipe, World(node, 4)) as batches:
                parts.append(contents(batches))
            assert folder_bytes(tmp_path / f"node{node}") <= 0.4 * total
    for step, (index, pixels) in enumerate(local):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), index)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), pixels)
    epochs = STEPS * BATCH / SAMPLES
    assert sum(served.sent.values()) <= 1.1 * epochs * total
    assert (served.seen["fail"] > 0) == bool(faults)


def test_ranks_and_workers_of_a_node_share_one_copy(
    stills: Path, local: list[tuple[torch.Tensor, torch.Tensor]], flaky: Any, tmp_path: Path
) -> None:
    served = flaky.Faults()
    with flaky.file_server(stills, served) as url:
        recipe = recipe_for(url, tmp_path / "cache", workers=2)
        with (
            batches_of(recipe, World(0, 2, 0, 2)) as first,
            batches_of(recipe, World(1, 2, 1, 2)) as second,
        ):
            for index, (one, other) in enumerate(zip(first, second, strict=True)):
                rows = torch.cat([batch.groups["stills"].pixels for batch in (one, other)])
                assert torch.equal(rows, local[index][1])
    shards = [path for path in served.sent if path.endswith(".tar")]
    assert all(served.sent[path] == (stills / path.lstrip("/")).stat().st_size for path in shards)
    assert len(shards) == SAMPLES // PER_SHARD


def test_shards_are_here_before_they_are_asked_for(stills: Path, flaky: Any, tmp_path: Path) -> None:
    """With the first batch a rank waits; then all that fits comes without being asked for."""
    with flaky.file_server(stills, flaky.Faults()) as url:
        with batches_of(recipe_for(url, tmp_path / "cache", workers=1)) as batches:
            next(batches)
            until = time.monotonic() + 30
            while len(list((tmp_path / "cache").glob("*.tar"))) < SAMPLES // PER_SHARD:
                assert time.monotonic() < until
                time.sleep(0.05)
        assert not [child for child in multiprocessing.active_children() if child.name == "prefetch"]


def test_a_cache_that_is_too_small_is_told_with_the_number(stills: Path, flaky: Any, tmp_path: Path) -> None:
    with flaky.file_server(stills, flaky.Faults()) as url:
        recipe = recipe_for(url, tmp_path / "cache")
        sources = open_sources(recipe)
        plan = build_plan(recipe, sources)
        needed = cache_needed(recipe, sources, plan, World())
        check_cache(with_limit(recipe, needed), open_sources(with_limit(recipe, needed)), {}, plan, World())
        small = with_limit(recipe, needed - 1)
        with pytest.raises(RecipeError, match=r"data.cache.gib=.* is too small: .* to at least 0\.\d+, use"):
            check_cache(small, open_sources(small), {}, plan, World())
        assert cache_needed(recipe, sources, plan, World(1, 4)) < needed


@pytest.mark.parametrize("workers", [0, 2])
def test_the_least_cache_is_enough(
    workers: int,
    stills: Path,
    local: list[tuple[torch.Tensor, torch.Tensor]],
    flaky: Any,
    tmp_path: Path,
) -> None:
    with flaky.file_server(stills, flaky.Faults()) as url:
        recipe = recipe_for(url, tmp_path / "cache", workers=workers)
        sources = open_sources(recipe)
        needed = cache_needed(recipe, sources, build_plan(recipe, sources), World())
        assert needed < folder_bytes(stills)
        with batches_of(with_limit(recipe, needed)) as batches:
            made = contents(batches)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(made, local, strict=True))


def test_a_store_that_ends_in_the_middle_ends_the_run_with_its_name(
    stills: Path, flaky: Any, tmp_path: Path
) -> None:
    with flaky.file_server(stills, flaky.Faults()) as url:
        cache = {"folder": str(tmp_path / "cache"), "stall_seconds": 0.5, "patience_seconds": 0.2}
        recipe = recipe_for(url, tmp_path / "cache", cache=cache)
        opened = batches_of(recipe)
        batches = opened.__enter__()
        next(batches)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    with pytest.raises(DataError, match=rf"{url}/shard-\d+.tar: the store failed"):
        list(batches)
    opened.__exit__(None, None, None)


def test_the_future_of_a_node_is_in_the_order_of_its_steps(stills: Path, flaky: Any, tmp_path: Path) -> None:
    with flaky.file_server(stills, flaky.Faults()) as url:
        recipe = recipe_for(url, tmp_path / "cache")
        sources = open_sources(recipe)
        future = NodeFuture(recipe, sources, build_plan(recipe, sources), World(), 0)
    wanted = future.wanted()
    assert {shard for _, _, shard in wanted} == {path.name for path in stills.glob("*.tar")}
    assert [step for step, _, _ in wanted] == sorted(step for step, _, _ in wanted)
    exact = {shard: step for step, _, shard in future.first_uses()}
    assert all(exact[shard] >= step for step, _, shard in wanted if shard in exact)
