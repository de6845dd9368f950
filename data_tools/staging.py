"""The folder in which shards are made, `OUT.partial`: who may work in it, what lies there, how it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.shard_plan import ITEMS_NAME, PLAN_NAME, open_plan, staging_of
from framework.data.manifest import MANIFEST_NAME
from framework.errors import DataError

__all__ = [
    "FINAL",
    "MERGING",
    "check_free",
    "clear",
    "locked",
    "remove_staging",
    "staging_folder",
    "sweep",
    "was_finished",
]

MERGING = "merging"
"""A file that says: all shards are made, their files may be on their way to the final folder."""
FINAL = "shards"
"""The final folder, while it is inside the staging folder."""
_OURS = re.compile(rf"(part-\d+\.(tar|done)|{PLAN_NAME}|{ITEMS_NAME}|{MERGING}|{FINAL})(\..*(tmp|new))?")

_logger = logging.getLogger(__name__)


@contextmanager
def staging_folder(out: Path, shared: bool | None = None) -> Iterator[Path]:
    """The staging folder of `out`, locked; it must be there already unless `shared` is None.

    Raises DataError if another process works in it, and for what the file system refuses.
    """
    staging = staging_of(out)
    if shared is not None and not staging.is_dir():
        open_plan(staging)
    try:
        with locked(staging, shared=bool(shared)):
            yield staging
    except OSError as error:
        kept = f" finished shards are kept in {staging}:" if _has_finished(staging) else ""
        raise DataError(
            f"{error.filename or staging}: cannot write the shards ({error.strerror});{kept} make room or set"
            " the permissions, and run the same command again"
        ) from error


@contextmanager
def locked(staging: Path, *, shared: bool = False) -> Iterator[None]:
    """Only one process plans or merges at a time, and none while others make shards (`shared`).

    The lock ends with the process that holds it. A file system without locks (Lustre mounted without `flock`,
    for one) goes without, and that is said.
    """
    staging.mkdir(parents=True, exist_ok=True)
    folder = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
            _logger.warning(
                "%s: cannot be locked (%s): start no second command on it", staging, error.strerror
            )
        # It may have got its final name between the two lines above.
        if not staging.exists() or not os.path.samestat(os.fstat(folder), staging.stat()):
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise DataError(f"{staging}: another process is making these shards; wait for it or end it") from None
    finally:
        os.close(folder)


def sweep(staging: Path) -> bool:
    """Remove what killed processes left half-written; whether any finished work is there.

    Raises DataError if the folder holds files that are not ours.
    """
    present = list(staging.iterdir())
    if foreign := [path.name for path in present if not _OURS.fullmatch(path.name)]:
        raise DataError(
            f"{staging}: shards are made in this folder, but it holds other files ({', '.join(foreign[:5])}):"
            " move them away, or choose another --out"
        )
    for path in present:
        if path.suffix in (".tmp", ".new"):
            path.unlink()
    return _has_finished(staging)


def _has_finished(staging: Path) -> bool:
    return any(path.suffix in (".tar", ".done") for path in staging.glob("part-*"))


def clear(staging: Path, keep: Sequence[str] = ()) -> None:
    """Empty a staging folder, but for the names in `keep`."""
    for path in staging.iterdir():
        if path.name == FINAL:
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def remove_staging(staging: Path) -> None:
    """Remove a staging folder; the mark that all was done goes last."""
    clear(staging, keep=(MERGING,))
    (staging / MERGING).unlink(missing_ok=True)
    staging.rmdir()


def was_finished(staging: Path, out: Path) -> bool:
    """Whether a run was killed after the final folder got its name, and before it had tidied up."""
    merged = (staging / MERGING).exists() and not (staging / FINAL).exists()
    return merged and (out / MANIFEST_NAME).exists()


def check_free(out: Path, overwrite: bool) -> None:
    """Nothing that a person might need is ever written over."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{out}: exists already; choose another --out, or replace it with --overwrite")
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(
            f"{out}: --overwrite replaces only a folder of shards, and this is none ({MANIFEST_NAME})"
        )
