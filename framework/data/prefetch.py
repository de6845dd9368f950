"""Fetching remote shards before they are needed: one process per rank that follows the plan.

It changes nothing of what is read: a worker that needs a shard which is not there yet fetches it itself.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from framework.data.nursery import leave_signals_to_the_rank
from framework.data.plan import Plan
from framework.data.remote import RemoteFolder
from framework.data.sources import OpenSource
from framework.data.windows import Spans, node_rows, peak_bytes, spans_between
from framework.errors import DataError, RecipeError, TubeworksError
from framework.recipe.schema import Recipe
from framework.world import World

__all__ = [
    "NodeFuture",
    "Prefetcher",
    "cache_needed",
    "check_cache",
    "shard_bytes",
    "start_prefetching",
    "steps_ahead",
]

log = logging.getLogger(__name__)

_LOOK_AGAIN = 0.1  # seconds
_REST = 1.0  # seconds until a shard is tried again that had no room, or another fetcher
_SORTED_STEPS = 64  # of so many steps the order of first use is taken exactly
_EPOCHS_CHECKED = 8  # each epoch has other shards side by side in a lane


def steps_ahead(recipe: Recipe) -> int:
    """How many steps before their turn the workers of a rank read."""
    made = recipe.data.prefetch * recipe.data.workers
    return -(-made // recipe.train.accumulation) + 2  # ranks of a node are a step apart at most


def shard_bytes(opened: OpenSource) -> NDArray[np.int64]:
    """Sizes of the shards of a source's folder."""
    return np.array([shard.bytes for shard in opened.manifest.shards], np.int64)


def cache_needed(recipe: Recipe, sources: Mapping[str, OpenSource], plan: Plan, world: World) -> int:
    """Bytes that the cache of this node must hold at least: the plan's window, and one shard besides."""
    remote = {name: opened for name, opened in sources.items() if opened.manifest.remote}
    if not remote:
        return 0
    sizes = {name: shard_bytes(opened) for name, opened in remote.items()}
    spans = {}
    for name in remote:
        checked = min(recipe.train.steps, math.ceil(_EPOCHS_CHECKED * plan.steps_per_epoch(name)))
        spans[name] = spans_between(plan, name, node_rows(plan.counts[name], world), 0, checked)
    # substitutes lie anywhere, so there is room for one of the others at a time
    spare = max(int(size.max()) for size in sizes.values())
    return peak_bytes(spans, sizes, steps_ahead(recipe)) + spare


def check_cache(
    recipe: Recipe,
    sources: Mapping[str, OpenSource],
    held_out: Mapping[str, OpenSource],
    plan: Plan,
    world: World,
) -> None:
    """Before training: the cache is large enough for what the plan of this node needs at one time.

    Errors:
        RecipeError: data.cache.gib is too small; it names the number that is needed.
        DataError: the disk has not so much left.
    """
    needed = cache_needed(recipe, sources, plan, world)
    remote = [opened.manifest.remote for opened in (*sources.values(), *held_out.values())]
    folders = [folder for folder in remote if folder]
    if not folders:
        return
    sizes = [int(shard_bytes(opened).max()) for opened in held_out.values() if opened.manifest.remote]
    ranks_workers = world.local_size * max(1, recipe.data.workers)
    needed += max(sizes, default=0) * ranks_workers  # each reads another shard during an evaluation
    cache = folders[0].cache
    if needed > cache.limit:
        raise RecipeError(
            f"data.cache.gib={recipe.data.cache.gib:g} is too small: with {world.size} rank(s), "
            f"{world.local_size} on this node, {needed / 2**30:.3g} GiB of shards are in use at a time; set "
            f"data.cache.gib to at least {math.ceil(needed / 2**30 * 1000) / 1000:g}, use more nodes, or "
            "lower data.block"
        )
    existing = cache.folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free + cache.used()
    if needed > free:
        raise DataError(
            f"{cache.folder}: {needed / 2**30:.3g} GiB of shards are in use at a time, and the disk has "
            f"{free / 2**30:.3g} GiB for them: point data.cache.folder to a larger one"
        )


@dataclass
class _Epochs:
    """The stretches of one source that are known so far: whole epochs, up to the step `known`."""

    spans: Spans
    known: int


class NodeFuture:
    """When the ranks of this node need which remote shard next; `step` is where this rank is."""

    def __init__(
        self, recipe: Recipe, sources: Mapping[str, OpenSource], plan: Plan, world: World, start_step: int
    ) -> None:
        self.folders: dict[str, RemoteFolder] = {
            name: opened.manifest.remote for name, opened in sources.items() if opened.manifest.remote
        }
        self._sources = dict(sources)
        self._plan = plan
        self._world = world
        self._accumulation = recipe.train.accumulation
        self._stop = recipe.train.steps
        self._rows = {name: node_rows(plan.counts[name], world) for name in self.folders}
        self._names = {name: [shard.name for shard in sources[name].manifest.shards] for name in self.folders}
        self._known: dict[str, _Epochs] = {}
        # memory shared with the processes that are forked later
        self.step = multiprocessing.get_context("fork").Value("q", start_step, lock=False)

    def next_uses(self) -> dict[str, float]:
        """The step at which each shard is needed next, by its key in the cache; inf: none that is known."""
        uses: dict[str, float] = {}
        for name, folder in self.folders.items():
            for shard, step in enumerate(self._next_steps(name).tolist()):
                key = folder.entries[self._names[name][shard]].key
                uses[key] = min(step, uses.get(key, math.inf))
        return uses

    def wanted(self) -> list[tuple[float, str, str]]:
        """(step, source, shard) of all that will be needed and is not here, in the order of need."""
        found = []
        for name, folder in self.folders.items():
            steps = self._next_steps(name)
            for shard in np.flatnonzero(np.isfinite(steps)).tolist():
                if not folder.cache.holds(folder.entries[self._names[name][shard]]):
                    found.append((float(steps[shard]), name, self._names[name][shard]))
        return sorted(found)

    def first_uses(self) -> list[tuple[float, str, str]]:
        """Like `wanted`, for the first steps of this rank alone, in the exact order of use."""
        now, found = int(self.step.value), {}
        for step in range(now, min(now + _SORTED_STEPS, self._stop)):
            for micro in range(self._accumulation):
                share = self._plan.share(
                    step,
                    rank=self._world.rank,
                    world=self._world.size,
                    micro=micro,
                    accumulation=self._accumulation,
                )
                for name in self.folders:
                    opened = self._sources[name]
                    for shard in opened.manifest.column("shard")[
                        opened.selection[share[name].index]
                    ].tolist():
                        found.setdefault((name, self._names[name][shard]), float(step))
        return [
            (step, name, shard)
            for (name, shard), step in found.items()
            if not self.folders[name].cache.holds(self.folders[name].entries[shard])
        ]

    def _next_steps(self, name: str) -> NDArray[np.float64]:
        """For each shard of a source the step of its next use by this node; inf: none that is known yet."""
        now = int(self.step.value)
        spans = self._spans(name, now)
        ahead = spans[spans.last >= now]
        steps = np.full(len(self._names[name]), np.inf)
        np.minimum.at(steps, ahead.shard, np.maximum(ahead.first, now).astype(np.float64))
        return steps

    def _spans(self, name: str, now: int) -> Spans:
        """The stretches from now to the end of the next epoch, or of the run."""
        epoch = math.ceil(self._plan.steps_per_epoch(name))
        known = self._known.get(name)
        if known is None or (known.known < self._stop and now + epoch >= known.known):
            until = min(self._stop, now + 2 * epoch)
            known = _Epochs(spans_between(self._plan, name, self._rows[name], now, until), until)
            self._known[name] = known
        return known.spans


def start_prefetching(
    recipe: Recipe, sources: Mapping[str, OpenSource], plan: Plan, world: World, start_step: int
) -> Prefetcher | None:
    """Let the caches of all remote sources follow the plan, and fetch ahead; None without remote ones."""
    future = NodeFuture(recipe, sources, plan, world, start_step)
    if not future.folders:
        return None
    for folder in future.folders.values():
        folder.follow(future.next_uses)
    return Prefetcher(future, recipe.data.cache.connections)


class Prefetcher:
    """A process that fetches what will be needed; it ends with the one that made it, however that ends."""

    def __init__(self, future: NodeFuture, connections: int) -> None:
        self._future = future
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=_prefetch, args=(future, connections, os.getpid()), name="prefetch", daemon=True
        )
        self._process.start()

    def arrived(self, step: int) -> None:
        """Tell the process and all workers where the rank is."""
        self._future.step.value = step

    def close(self) -> None:
        """End it at once; what was half fetched is given up."""
        self._process.kill()
        self._process.join()

    def __del__(self) -> None:
        with suppress(AttributeError, AssertionError, ValueError):  # never started, or of another process
            self.close()


def _prefetch(future: NodeFuture, connections: int, parent: int) -> None:
    """The life of the process."""
    leave_signals_to_the_rank(parent)
    running: dict[Future[bool], tuple[str, str]] = {}
    resting: dict[tuple[str, str], float] = {}  # not before this time again
    queue: deque[tuple[float, str, str]] = deque()
    planned: tuple[int, float] = (-1, 0.0)  # at which step, and until when the queue is good
    with ThreadPoolExecutor(connections, "prefetch") as pool:
        while True:
            now = time.monotonic()
            if planned[0] != future.step.value or (not queue and planned[1] <= now):
                planned = (future.step.value, now + _LOOK_AGAIN)
                queue = deque(chain(future.first_uses(), future.wanted()))
            busy = {*running.values(), *(key for key, until in resting.items() if until > now)}
            while queue and len(running) < connections:
                needed, name, shard = queue.popleft()
                if (name, shard) not in busy:
                    busy.add((name, shard))
                    running[pool.submit(future.folders[name].prefetch, shard, needed)] = (name, shard)
            done, _ = wait(running, timeout=_LOOK_AGAIN, return_when=FIRST_COMPLETED)
            for one in done:
                rest = 0.0 if _succeeded(one) else _REST
                resting[running.pop(one)] = time.monotonic() + rest
            if not running and not queue:
                time.sleep(_LOOK_AGAIN)


def _succeeded(fetched: Future[bool]) -> bool:
    """Whether a shard is here now; what is wrong with it hits the worker that needs it."""
    try:
        return fetched.result()
    except (TubeworksError, OSError) as error:
        log.warning("fetching ahead failed, and is left to the worker that needs it: %s", error)
        return False
