"""Files of a remote folder of shards, fetched with patience: http(s), s3 and gs, through fsspec.

A file is fetched in pieces, each with a time limit of its own, so that a connection that stalls or breaks
costs one piece. What a store does wrong for a moment (5xx, 429, broken and silent connections, answers cut
short) is tried again with growing pauses until the patience is used up; what only a person can mend (no such
file, no permission) ends at once with one line. Addresses in messages and logs carry no secrets.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from framework.data.urls import redacted
from framework.errors import DataError

__all__ = ["Patience", "RemoteStore"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Trouble = Literal["missing", "denied", "changed", "passing", "defect"]

PIECE = 8 << 20
_SLOWEST = 100_000  # bytes a second; a piece that comes more slowly is asked for again
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
    """A folder at an address that `parse_location` has let through; safe after a fork, and in threads."""

    def __init__(self, url: str, patience: Patience, connections: int = 4) -> None:
        self.url = url
        self._patience = patience
        self._connections = connections
        self._systems: dict[int, Any] = {}
        self._ranges = True  # until the server shows that it sends whole files only

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_systems": {}}

    def address(self, name: str) -> str:
        """The full address of a file in this folder."""
        return f"{self.url}/{name}"

    def read(self, name: str, patience: Patience | None = None) -> bytes:
        """The bytes of a small file.

        Errors:
            DataError: it is not there, may not be read, or the store failed for too long.
        """
        limit = (patience or self._patience).stall + 60.0
        return self._patiently(
            lambda: self._call("_cat_file", name, limit=limit), name, patience or self._patience
        )

    def facts(self, name: str) -> dict[str, Any]:
        """What the store says of a file: {"size": bytes or None, "etag": text or None}; errors of `read`."""
        limit = self._patience.stall
        info = self._patiently(lambda: self._call("_info", name, limit=limit), name, self._patience)
        tags = {key.lower(): value for key, value in info.items()}
        etag = tags.get("etag") or tags.get("generation") or tags.get("last-modified")
        return {"size": info.get("size"), "etag": None if etag is None else str(etag).strip('"')}

    def sizes(self) -> dict[str, int] | None:
        """Names and sizes of all files in the folder; None where the store has no listing to give."""
        if not self.url.startswith(("s3://", "gs://")):
            return None
        try:
            found = self._call("_ls", "", limit=self._patience.stall + 60.0, detail=True)
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
        if size == 0:
            return
        first = self._piece(name, 0, min(PIECE, size), size)
        _write_all(descriptor, first, 0)
        starts = range(len(first), size, PIECE)
        if not starts:
            return

        def fetch_piece(start: int) -> None:
            stop = min(start + PIECE, size)
            _write_all(descriptor, self._piece(name, start, stop, size), start)

        if not parallel or len(starts) == 1:
            for start in starts:
                fetch_piece(start)
            return
        with ThreadPoolExecutor(min(self._connections, len(starts)), "fetch") as pool:
            for done in [pool.submit(fetch_piece, start) for start in starts]:
                done.result()

    def _piece(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes start … stop-1, or the whole file from a server that knows no ranges."""

        def attempt() -> bytes:
            expected = stop - start if self._ranges else size
            limit = self._patience.stall + expected / _SLOWEST
            data = self._call("_cat_file", name, limit=limit, start=start, end=stop)
            if len(data) == size and stop - start < size:  # 200 instead of 206
                self._ranges = False
                return data if start == 0 else data[start:stop]
            if len(data) != stop - start:
                self._complain_of_length(name, size)
                raise _CutShort(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._patiently(attempt, name, self._patience)

    def forget_connections(self) -> None:
        """Let the next request open new ones."""
        self._systems = {}

    def _complain_of_length(self, name: str, size: int) -> None:
        """Tell a file of another length from an answer that was cut short."""
        found = self._call("_info", name, limit=self._patience.stall).get("size")
        if found is not None and found != size:
            raise _Changed(f"{found} bytes instead of {size}")

    def _call(self, method: str, name: str, *, limit: float, **options: Any) -> Any:
        """One request through fsspec, ended after `limit` seconds."""
        from fsspec.asyn import sync

        system = self._system()
        path = self.address(name) if name else self.url
        return sync(system.loop, getattr(system, method), path, timeout=limit, **options)

    def _system(self) -> Any:
        """fsspec's file system for this address, made anew in a forked process."""
        process = os.getpid()
        if process not in self._systems:
            self._systems = {process: _open_system(self.url, self._patience.stall)}
        return self._systems[process]

    def _patiently(self, attempt: Callable[[], Result], name: str, patience: Patience) -> Result:
        """The result of `attempt`, tried again while its failures are of the passing kind."""
        failures, began = 0, time.monotonic()
        while True:
            try:
                return attempt()
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
            time.sleep(pause)

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


class _CutShort(OSError):
    """An answer of another length than asked for."""


class _Changed(OSError):
    """A file that is not the one that was expected."""


def _open_system(url: str, stall: float) -> Any:
    """fsspec's file system; its own retries are off where it has any, as the patience is ours."""
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
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
    if isinstance(error, (OSError, TimeoutError)) or package in {*_NETWORK_PACKAGES, "fsspec", "s3fs"}:
        return "passing"
    return "defect"


def reason_of(error: BaseException) -> str:
    """A failure in a few words, without anything that could be secret."""
    status = _status(error)
    if type(error).__name__ == "FSTimeoutError" or isinstance(error, TimeoutError):
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
