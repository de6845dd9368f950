"""Byte access to samples inside shards: by offset, verified, and safe to share with forked workers."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import OrderedDict
from pathlib import Path

from zlib_ng.zlib_ng import crc32  # zlib's at 13 times its speed; ISA-L's leaves the next decoder slow

from framework.data import progress
from framework.data.manifest import SampleInfo
from framework.data.remote import RemoteFolder
from framework.data.urls import Place
from framework.errors import CorruptSample, DataError

__all__ = ["ShardReader"]

_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class ShardReader:
    """Reads samples from the shards of one folder, keeping at most `open_files` of them open.

    Reading is by `pread`, which moves no file position, so descriptors inherited by a forked worker are safe.
    Shards of a store come through `remote`, and a shared lock keeps those that are open in its cache.
    """

    def __init__(
        self, folder: Place, source: str, open_files: int = 32, remote: RemoteFolder | None = None
    ) -> None:
        self._folder = folder
        self._remote = remote
        self._source = source
        self._limit = open_files
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, sample: SampleInfo) -> bytes:
        """The media bytes of a sample, without looking at their checksum.

        Errors:
            DataError: the shard is missing or cannot be read.
            CorruptSample: the shard ends before the sample does.
        """
        data = self._pread(sample.shard, sample.offset, sample.length)
        if len(data) != sample.length:
            raise self.corrupt(
                sample, f"the shard ends after {len(data)} of the sample's {sample.length} bytes"
            )
        return data

    def verify(self, sample: SampleInfo, data: bytes) -> bytes:
        """The bytes, if they are those that were written into the shard; else CorruptSample.

        A copy of a remote shard that was damaged on this machine is fetched again first.
        """
        actual = crc32(data)
        if actual != sample.crc32 and self._remote:
            # It was whole when it was fetched, so the local copy was damaged since.
            progress.stage("read")
            self._close(sample.shard)
            self._remote.discard(sample.shard)
            data = self.read(sample)
            actual = crc32(data)
        if actual != sample.crc32:
            raise self.corrupt(
                sample,
                f"checksum of the bytes is {actual:08x}, the manifest says {sample.crc32:08x}: the shard was "
                f"changed or damaged after it was written; copy {self._folder / sample.shard} again, or set "
                "data.on_corrupt=substitute to train without the sample",
            )
        return data

    def corrupt(self, sample: SampleInfo, reason: str) -> CorruptSample:
        """The error for a sample of this folder that cannot be used."""
        return CorruptSample(
            reason, source=self._source, shard=sample.shard, key=sample.key, offset=sample.offset
        )

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _pread(self, shard: str, offset: int, length: int) -> bytes:
        path = self._folder / shard
        try:
            descriptor = self._descriptor(shard)
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # the kernel returns at most 2 GiB at once, and less on some networks
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except FileNotFoundError:
            raise DataError(
                f"source {self._source}: shard {path} is missing; it was there when the run started: "
                "restore it and start again, the run goes on from its last checkpoint"
            ) from None
        except (OSError, OverflowError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise DataError(
                f"source {self._source}: cannot read {length} bytes at offset {offset} of {path}: "
                f"{reason}; check the file system and the permissions"
            ) from error
        return data

    def _descriptor(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= self._limit:
            os.close(self._files.popitem(last=False)[1])
        descriptor = (
            self._open_cached(shard) if self._remote else os.open(Path(str(self._folder)) / shard, _FLAGS)
        )
        self._files[shard] = descriptor
        return descriptor

    def _open_cached(self, shard: str) -> int:
        """Open the copy of a remote shard, and lock it, so that other runs on this node leave it there."""
        assert self._remote is not None
        for name in [name for name, open_one in self._files.items() if os.fstat(open_one).st_nlink == 0]:
            self._close(name)  # this run has made room by it; open, it would go on to fill the disk
        while True:
            path = self._remote.path(shard)
            with contextlib.suppress(FileNotFoundError):  # it had to make room in the meantime
                descriptor = os.open(path, _FLAGS)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.utime(path)
                return descriptor

    def _close(self, shard: str) -> None:
        descriptor = self._files.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)
