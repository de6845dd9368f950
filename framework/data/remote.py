"""A remote folder of shards as its readers see it: files on this node, fetched when they are needed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from framework.data.cache import CacheEntry, ChecksumDiffers, NextUses, ShardCache, default_cache_folder
from framework.data.store import Patience, RemoteStore
from framework.data.urls import parse_location
from framework.errors import DataError
from framework.recipe.cache_section import Cache

__all__ = ["RemoteFolder"]

log = logging.getLogger(__name__)

TABLE_DAYS = 30
"""So long a table of samples stays in the cache after it was last opened."""
_PATIENCE_AT_START = 30.0  # a wrong address should not take ten minutes to be told


class RemoteFolder:
    """The files of one folder in a store, and the cache that they come through.

    `entries` maps the names of shards to what they must be; it is filled by whoever has read the manifest.
    """

    def __init__(self, location: str, settings: Cache | None = None) -> None:
        settings = settings or Cache()
        patience = Patience(settings.stall_seconds, settings.patience_seconds)
        folder = Path(settings.folder).expanduser() if settings.folder else default_cache_folder()
        self.settings = settings
        self.url = parse_location(location)
        self.store = RemoteStore(self.url, patience, settings.connections)
        self.cache = ShardCache(folder, round(settings.gib * 2**30))
        self.entries: dict[str, CacheEntry] = {}
        self._tables = ShardCache(folder / "tables", 2**62)
        self._at_start = replace(patience, total=min(patience.total, _PATIENCE_AT_START))

    def read(self, name: str) -> bytes:
        """The bytes of a small file, as they are in the store now. Errors: DataError."""
        return self.store.read(name, self._at_start)

    def table(self, name: str, size: int, blake2b: str) -> Path:
        """A local copy of a table, outside of the cache's limit. Errors: DataError.

        Tables that nobody has opened for `TABLE_DAYS` make way here; a process that still has such a one
        mapped keeps its bytes.
        """
        entry = self._entry(name, size, blake2b)
        if self._tables.holds(entry):
            with contextlib.suppress(FileNotFoundError):  # removed since: then it is fetched below
                os.utime(self._tables.folder / entry.key)
        self._tables.remove_unused(TABLE_DAYS * 86_400)
        path = self._fetched(self._tables, entry, name, -math.inf, True)
        assert path is not None
        return path

    def add(self, shards: Sequence[tuple[str, int, str]]) -> None:
        """Make shards known: name, size in bytes and blake2b of each."""
        self.entries |= {name: self._entry(name, size, blake2b) for name, size, blake2b in shards}

    def path(self, name: str) -> Path:
        """A local file with the bytes of a shard, fetched now if it is not here. Errors: DataError."""
        path = self._fetched(self.cache, self.entries[name], name, -math.inf, True)
        assert path is not None
        return path

    def prefetch(self, name: str, needed: float) -> bool:
        """Fetch a shard that is needed at the step `needed`, unless another does it or there is no room."""
        return self._fetched(self.cache, self.entries[name], name, needed, False) is not None

    def discard(self, name: str) -> None:
        """Forget the local copy of a shard, whose bytes were damaged here."""
        self.cache.discard(self.entries[name])

    def follow(self, next_uses: NextUses) -> None:
        """From now on make room by this plan's future."""
        self.cache.next_uses = next_uses

    def _entry(self, name: str, size: int, blake2b: str) -> CacheEntry:
        return CacheEntry(self.store.address(name), size, blake2b)

    def _fetched(
        self, cache: ShardCache, entry: CacheEntry, name: str, needed: float, wait: bool
    ) -> Path | None:
        fetch = _fetcher(self.store, name, entry.bytes, parallel=wait)
        try:
            return cache.get(entry, fetch, needed=needed, wait=wait)
        except ChecksumDiffers as error:
            log.warning("%s; fetching it again", error)
        before = self.store.facts(name)
        try:
            return cache.get(entry, fetch, needed=needed, wait=wait)
        except ChecksumDiffers:
            now = self.store.facts(name)
            changed = "it changed while it was fetched" if now != before else "it was replaced or damaged"
            raise DataError(
                f"{entry.address}: not the file that the manifest lists (blake2b differs twice; "
                f"{now['size']} bytes, etag {now['etag']}; listed {entry.bytes} bytes): {changed} after the "
                "manifest was written; copy the folder to the store again"
            ) from None


def _fetcher(store: RemoteStore, name: str, size: int, *, parallel: bool) -> Callable[[int], None]:
    return lambda descriptor: store.fetch(name, size, descriptor, parallel)
