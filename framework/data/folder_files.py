"""Whether the files of a folder of shards are there, on this machine or in a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from framework.data.remote import RemoteFolder
from framework.data.urls import Place
from framework.errors import DataError

__all__ = ["check_sizes", "read_local"]


def read_local(folder: Path, name: str) -> bytes:
    """The manifest of a folder on this machine. Raises DataError that tells a wrong path from a bad copy."""
    path = folder / name
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if not folder.exists():
            raise DataError(f"{folder}: no such folder; check the path, or make the shards first") from None
        raise DataError(
            f"{folder}: no {name} here: not a folder of shards, or one that was copied in part;"
            " make it with `tubeworks data shard`"
        ) from None
    except NotADirectoryError:
        raise DataError(f"{folder}: is a file; give the folder that holds {name}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path and the permissions") from error


def check_sizes(folder: Place, expected: Mapping[str, int], remote: RemoteFolder | None) -> None:
    """Compare the sizes of shards, in bytes by name, with those of the files.

    A store that gives no listing is passed over: there a missing shard shows when it is fetched.
    Raises DataError that lists what is missing or of the wrong size.
    """
    listed: Mapping[str, int] | None = None
    if remote:
        listed = remote.store.sizes()
        if listed is None:
            return
    missing, wrong = [], []
    for name, right in expected.items():
        try:
            # a Path costs more than the call
            size = os.stat(os.path.join(str(folder), name)).st_size if listed is None else listed.get(name)
        except FileNotFoundError:
            size = None
        except OSError as error:
            raise DataError(f"{folder / name}: {error.strerror}; check the permissions") from error
        if size is None:
            missing.append(name)
        elif size != right:
            wrong.append(f"{name} ({size} bytes instead of {right})")
    for names, what in ((missing, "missing"), (wrong, "of the wrong size")):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise DataError(
                f"{folder}: {len(names)} of {len(expected)} shards {what}: {', '.join(names[:5])}{more};"
                " copy them again from where the set was made, or shard anew"
            )
