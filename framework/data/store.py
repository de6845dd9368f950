"""Files of a remote folder of shards, fetched with patience: http(s), s3 and gs, through fsspec.

A file is fetched in pieces, each with a time limit of its own, so that a connection that stalls or breaks
costs one piece. What a store does wrong for a moment (5xx, 429, broken and silent connections, answers cut
short) is tried again with growing pauses until the patience is used up; what only a person can mend (no such
file, no permission) ends at once with one line. Addresses in messages and logs carry no secrets.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from framework.data import progress
from framework.data.urls import redacted
from framework.errors import DataError

__all__ = ["Patience", "RemoteStore"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Trouble = Literal["missing", "denied", "changed", "passing", "defect"]

PIECE = 8 << 20
_SLOWEST = 100_000  # bytes a second; a piece that comes more slowly is asked for again
_SMALL_FILE = 60.0  # seconds that a manifest or a listing may take
_LONGEST_PAUSE = 15.0
_QUIET_FAILURES = 2  # a store that fails now and then is normal; more in a row are told
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
_NETWORK_PACKAGES = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3"}


@dataclass(frozen=True)
class Patience:
    """A request ends after `stall` seconds without a byte, a file after `total` seconds of failures."""

    stall: float = 20.0
    total: float = 600.0


class RemoteStore:
    """A folder at an address that `parse_location` has let through; safe to use by threads and after a fork.

    Each call opens its own connections, on an event loop of its own, and closes them before it returns: a
    process that forks must not have any, because parent and child would share them.
    """

    def __init__(self, url: str, patience: Patience, connections: int = 4) -> None:
        self.url = url
        self._patience = patience
        self._connections = connections
        self._ranges = True  # until the server shows that it sends whole files only

    def address(self, name: str) -> str:
        """The full address of a file in this folder."""
        return f"{self.url}/{name}"

    def read(self, name: str, patience: Patience | None = None) -> bytes:
        """The bytes of a small file.

        Errors:
            DataError: it is not there, may not be read, or the store failed for too long.
        """
        patience = patience or self._patience
        request = _Request("_cat_file", self.address(name), patience.stall + _SMALL_FILE)
        return self._run(lambda system: self._patiently(lambda: request.of(system), name, patience))

    def facts(self, name: str) -> dict[str, Any]:
        """What the store says of a file: {"size": bytes or None, "etag": text or None}; errors of `read`."""
        request = _Request("_info", self.address(name), self._patience.stall)
        info = self._run(lambda system: self._patiently(lambda: request.of(system), name, self._patience))
        tags = {key.lower(): value for key, value in info.items()}
        etag = tags.get("etag") or tags.get("generation") or tags.get("last-modified")
        return {"size": info.get("size"), "etag": None if etag is None else str(etag).strip('"')}

    def sizes(self) -> dict[str, int] | None:
        """Names and sizes of all files in the folder; None where the store has no listing to give."""
        if not self.url.startswith(("s3://", "gs://")):
            return None
        request = _Request("_ls", self.url, self._patience.stall + _SMALL_FILE, {"detail": True})
        try:
            found = self._run(request.of)
        except Exception as error:
            if trouble_of(error) == "defect":
                raise
            return None  # no permission to list, say; a missing shard is then found when it is read
        return {os.path.basename(entry["name"]): int(entry["size"] or 0) for entry in found}

    def fetch(self, name: str, size: int, descriptor: int, parallel: bool = True) -> None:
        """Write the `size` bytes of a file into an open local one; its checksum is the caller's business.

        Errors:
            DataError: as in `read`, or the file is shorter or longer than `size`.
            OSError: the local file cannot be written.
        """

        async def fetch_all(system: Any) -> None:
            first = await self._piece(system, name, 0, min(PIECE, size), size)
            _write_all(descriptor, first, 0)
            gate = asyncio.Semaphore(self._connections if parallel else 1)

            async def fetch_one(start: int) -> None:
                async with gate:
                    data = await self._piece(system, name, start, min(start + PIECE, size), size)
                    _write_all(descriptor, data, start)

            await _all_or_none([fetch_one(start) for start in range(len(first), size, PIECE)])

        if size:
            self._run(fetch_all)

    async def _piece(self, system: Any, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes start … stop-1, or the whole file from a server that knows no ranges."""

        async def attempt() -> bytes:
            expected = stop - start if self._ranges else size
            limit = self._patience.stall + expected / _SLOWEST
            data = await _Request("_cat_file", self.address(name), limit, {"start": start, "end": stop}).of(
                system
            )
            if len(data) == size and stop - start < size:  # 200 instead of 206
                self._ranges = False
                return data if start == 0 else data[start:stop]
            if len(data) != stop - start:
                found = (await _Request("_info", self.address(name), limit).of(system)).get("size")
                if found is not None and found != size:
                    raise _Changed(f"{found} bytes instead of {size}")
                raise _CutShort(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return await self._patiently(attempt, name, self._patience)

    def _run(self, work: Callable[[Any], Awaitable[Result]]) -> Result:
        """Do some work with fsspec's file system for this address, which is closed afterwards."""

        async def run() -> Result:
            system = _open_system(self.url, self._patience.stall)
            try:
                return await work(system)
            finally:
                await _close_system(system)

        return asyncio.run(run())

    async def _patiently(
        self, attempt: Callable[[], Awaitable[Result]], name: str, patience: Patience
    ) -> Result:
        """The result of `attempt`, tried again while its failures are of the passing kind."""
        failures, began = 0, time.monotonic()
        while True:
            try:
                return await attempt()
            except Exception as error:
                trouble = trouble_of(error)
                if trouble == "defect":
                    raise
                failures += 1
                spent = time.monotonic() - began
                if trouble != "passing" or spent >= patience.total:
                    raise self._give_up(name, error, trouble, failures, spent) from None
                pause = min(_LONGEST_PAUSE, 0.25 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                pause = min(pause, max(0.0, patience.total - spent))
                level = logging.DEBUG if failures <= _QUIET_FAILURES else logging.WARNING
                log.log(level, "%s: %s; trying again in %.1f s", self.address(name), reason_of(error), pause)
            progress.stage("read")  # a sign of life: who is patient does not hang
            await asyncio.sleep(pause)

    def _give_up(
        self, name: str, error: Exception, trouble: Trouble, failures: int, spent: float
    ) -> DataError:
        where = self.address(name)
        if trouble == "missing":
            return DataError(
                f"{where}: the store has no such file; check the address, or copy the shards there"
            )
        if trouble == "denied":
            return DataError(
                f"{where}: the store refuses to give this file ({reason_of(error)}): check the credentials "
                "in the environment (docs/data.md, Where shards live) and who may read there"
            )
        if trouble == "changed":
            return DataError(
                f"{where}: the file is not the one that the manifest lists ({reason_of(error)}): it was "
                "replaced after the manifest was written; copy the folder to the store again"
            )
        return DataError(
            f"{where}: the store failed {failures} times in {spent:.0f} s, the last: {reason_of(error)}; "
            "check the network and the store, then start again: a run goes on from its last checkpoint"
        )


@dataclass(frozen=True)
class _Request:
    """One call of fsspec, ended after `limit` seconds."""

    method: str
    path: str
    limit: float
    options: dict[str, Any] = field(default_factory=dict)

    async def of(self, system: Any) -> Any:
        return await asyncio.wait_for(getattr(system, self.method)(self.path, **self.options), self.limit)


async def _all_or_none(work: list[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; the first failure ends the others."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _CutShort(OSError):
    """An answer of another length than asked for."""


class _Changed(OSError):
    """A file that is not the one that was expected."""


def _open_system(url: str, stall: float) -> Any:
    """fsspec's file system; its own retries are off where it has any, as the patience is ours."""
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"asynchronous": True, "use_listings_cache": False, "skip_instance_cache": True}
    if protocol == "s3":
        timeouts = {"connect_timeout": stall, "read_timeout": stall}
        options["config_kwargs"] = {**timeouts, "retries": {"max_attempts": 0}}
    elif protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
        # trust_env: proxies and ~/.netrc; identity: a compressed answer could not be cut into ranges
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        options["headers"] = {"Accept-Encoding": "identity"}
    try:
        system = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package = _EXTRAS.get(protocol, protocol)
        raise DataError(
            f"{url}: reading from {protocol}:// needs the package {package}: "
            f"pip install 'tubeworks[{protocol}]'"
        ) from error
    if protocol == "s3":
        system.retries = 1
    return system


async def _close_system(system: Any) -> None:
    """Close the connections; the name of the method that tells them differs."""
    session = await (system.set_session() if hasattr(system, "set_session") else system._set_session())
    await session.close()


def trouble_of(error: BaseException) -> Trouble:
    """What kind of failure this is; "defect" is none of the store's."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "missing"
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return "denied"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return "denied"
    if status in (412, 416) or isinstance(error, _Changed):
        return "changed"
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return "denied"
    package = type(error).__module__.partition(".")[0]
    # s3fs turns what it does not know into ValueError and RuntimeError of its client's words
    if isinstance(error, (OSError, asyncio.TimeoutError)) or package in {
        *_NETWORK_PACKAGES,
        "fsspec",
        "s3fs",
    }:
        return "passing"
    return "defect"


def reason_of(error: BaseException) -> str:
    """A failure in a few words, without anything that could be secret."""
    status = _status(error)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):  # two classes until Python 3.11
        return "it stalled: no answer in time"
    text = " ".join(str(getattr(error, "message", None) or error).split())
    if isinstance(error, (_CutShort, _Changed)):
        return text
    words = f"{type(error).__name__}: {redacted(text)}"[:200] if text else type(error).__name__
    return f"HTTP {status}, {words}" if status is not None else words


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of any of the clients tells; None where no answer came to its end."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    for one in (error, getattr(error, "__cause__", None)):  # s3fs puts its own error before botocore's
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
