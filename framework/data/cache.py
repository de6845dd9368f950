"""Whole shards of remote stores on a disk of this node, shared by all processes on it.

The folder holds one file per shard, named by a hash of its full address, size and checksum, so that shards of
the same name from two places, or from before and after a change, never meet. A shard is fetched under a
temporary name, compared with the manifest's checksum, and renamed.

Processes agree through locks of the kernel (`flock`), which end with the process that holds them, however it
ends: one lock on the temporary file says who fetches a shard, one on the folder guards the making of room.
A reader holds a shared lock on the shards that it has open, so that another run's shards in use stay.

Room is made by the plan's own future: first those go that no plan of this run knows, the longest unused
first, then the shard that the plan needs last, which is the optimum (Belady 1966, "A study of replacement
algorithms").
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from framework.data.urls import redacted
from framework.errors import DataError
from framework.files import hash_file

__all__ = ["CacheEntry", "ChecksumDiffers", "ShardCache", "default_cache_folder"]

log = logging.getLogger(__name__)

_PART = ".part"
_LOOK_AGAIN = 0.02  # seconds
NextUses = Callable[[], Mapping[str, float]]
"""For the cache keys that this run knows: the step at which each is needed next, inf for never again."""


def default_cache_folder() -> Path:
    """`tubeworks` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tubeworks"


@dataclass(frozen=True)
class CacheEntry:
    """One file of a store: its full address, and size (bytes) and blake2b (hex) that it must have."""

    address: str
    bytes: int
    blake2b: str

    @functools.cached_property
    def key(self) -> str:
        """The name of the file in the cache."""
        text = f"{self.address}\n{self.bytes}\n{self.blake2b}"
        name = self.address.rpartition("/")[2]
        return f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}-{name[-100:]}"


@dataclass
class ShardCache:
    """Files of stores in `folder`, at most `limit` bytes; `next_uses` is set where there is a plan."""

    folder: Path
    limit: int
    next_uses: NextUses | None = field(default=None, repr=False)

    def holds(self, entry: CacheEntry) -> bool:
        """Whether the shard is here, whole."""
        try:
            return os.stat(self.folder / entry.key).st_size == entry.bytes
        except OSError:
            return False

    def get(
        self,
        entry: CacheEntry,
        fetch: Callable[[int], None],
        *,
        needed: float = -math.inf,
        wait: bool = True,
    ) -> Path | None:
        """The file of a shard, fetched by `fetch(descriptor)` where it is not here yet.

        Only shards that are needed after the step `needed` make room for it. With `wait` False the answer is
        None where another process fetches it already, or where no room can be made.

        Errors:
            DataError: no room, a full disk, or bytes that are not those of the checksum.
        """
        path = self.folder / entry.key
        while not self.holds(entry):
            descriptor = self._lock_part(path, wait)
            if descriptor is None:
                return None
            try:
                # while this process waited, the one before it may have finished
                if self.holds(entry) or self._fetch(entry, path, descriptor, fetch, needed, wait):
                    continue
                return None
            finally:
                with contextlib.suppress(FileNotFoundError):
                    if _same_file(descriptor, _part(path)):
                        os.unlink(_part(path))
                os.close(descriptor)
        return path

    def discard(self, entry: CacheEntry) -> None:
        """Forget a shard whose bytes were damaged here."""
        (self.folder / entry.key).unlink(missing_ok=True)

    def remove_unused(self, seconds: float) -> None:
        """Remove what was not written or touched for so long, unless a process has it locked."""
        self._make_folder()
        with self._folder_lock():
            for name, status in self._files():
                if time.time() - status.st_mtime > seconds:
                    self._remove_unlocked(name)

    def used(self) -> int:
        """Bytes of all shards here, fetched or being fetched."""
        return sum(status.st_size for _, status in self._files())

    def _fetch(
        self,
        entry: CacheEntry,
        path: Path,
        descriptor: int,
        fetch: Callable[[int], None],
        needed: float,
        wait: bool,
    ) -> bool:
        """Fetch into the locked temporary file and give it its name; False without room (never if `wait`)."""
        try:
            with self._folder_lock():
                if not self._make_room(entry, path, needed, wait):
                    return False
                os.ftruncate(descriptor, 0)
                if entry.bytes:
                    os.posix_fallocate(descriptor, 0, entry.bytes)  # counts as used from now on
            fetch(descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DataError(
                f"{self.folder}: the disk is full: {entry.bytes / 2**20:.1f} MiB for "
                f"{redacted(entry.address)} do not fit; point data.cache.folder to a larger disk, or lower "
                "data.cache.gib"
            ) from error
        if hash_file(_part(path)) != entry.blake2b:
            raise ChecksumDiffers(
                f"{redacted(entry.address)}: the checksum of what came is not that of the manifest"
            )
        # Not synced to the disk: what a power failure damages is found by the samples' own checksums.
        # Locked: who lists the folder meanwhile could see neither of the two names and count too little.
        with self._folder_lock():
            os.rename(_part(path), path)
        return True

    def _lock_part(self, path: Path, wait: bool) -> int | None:
        """Open and lock the temporary file of a shard; None where another process has it and not `wait`."""
        self._make_folder()
        while True:
            descriptor = os.open(_part(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            while _same_file(descriptor, _part(path)):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        os.close(descriptor)
                        return None
                    # Not in the kernel: once the file has its name, readers lock it for as long as they like.
                    time.sleep(_LOOK_AGAIN)
                else:
                    if _same_file(descriptor, _part(path)):
                        return descriptor
            os.close(descriptor)  # the one before us has renamed or removed it

    @contextlib.contextmanager
    def _folder_lock(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.folder}: the cache of shards cannot be made here ({error.strerror}); "
                "set data.cache.folder to a folder on a local disk"
            ) from error

    def _files(self) -> list[tuple[str, os.stat_result]]:
        """Names and facts of all shards here and of the temporary files."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False) and entry.name != ".lock":
                        found.append((entry.name, entry.stat(follow_symlinks=False)))
        return found

    def _make_room(self, entry: CacheEntry, path: Path, needed: float, must: bool) -> bool:
        """Remove shards until `entry` fits; called under the folder's lock."""
        own = _part(path).name
        files = [(name, status) for name, status in self._files() if name != own]
        used = sum(status.st_size for _, status in files) + entry.bytes
        for name, status in [file for file in files if used > self.limit and file[0].endswith(_PART)]:
            used -= status.st_size if self._remove_unlocked(name) else 0
        if used <= self.limit:
            return True
        uses = self.next_uses() if self.next_uses else {}
        shards = [(name, status) for name, status in files if not name.endswith(_PART)]
        strangers = sorted(
            (file for file in shards if file[0] not in uses), key=lambda file: file[1].st_mtime_ns
        )
        own_shards = sorted(
            (file for file in shards if uses.get(file[0], -math.inf) > needed), key=lambda f: -uses[f[0]]
        )
        possible = sum(status.st_size for _, status in (*strangers, *own_shards))
        if used - possible <= self.limit:
            for name, status in strangers:
                if used > self.limit and self._remove_unlocked(name):
                    used -= status.st_size
            for name, status in own_shards:
                if used > self.limit:
                    (self.folder / name).unlink(missing_ok=True)
                    used -= status.st_size
        if used > self.limit and must:
            raise DataError(
                f"{self.folder}: the cache is full: {entry.bytes / 2**20:.1f} MiB for "
                f"{redacted(entry.address)} do not fit beside shards in use into data.cache.gib="
                f"{self.limit / 2**30:.3g}; raise it, or give other runs on this node a data.cache.folder of "
                "their own"
            )
        return used <= self.limit

    def _remove_unlocked(self, name: str) -> bool:
        """Remove a file that no process has locked: one in use, or one that is being fetched, stays."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / name)
            return True
        finally:
            os.close(descriptor)


class ChecksumDiffers(DataError):
    """What a store gave is not what the manifest lists."""


def _part(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
