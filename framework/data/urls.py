"""Where a folder of shards lies: a path on this machine, or an address of a store. Nothing is opened here.

Only a few kinds of addresses are let through, and none that carries a password: an address stands in recipes,
logs and in MLflow, and some of fsspec's other kinds run programs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from framework.errors import DataError

__all__ = ["PROTOCOLS", "Address", "Place", "parse_location", "place_of", "redacted"]

PROTOCOLS = ("http", "https", "s3", "gs")
"""Stores that shards may be read from; `file://` is the same as a path."""

_ONE_SLASH = re.compile(r"^(?:s3|gs|gcs|https?|file):/(?!/)", re.IGNORECASE)
_SECRETS = re.compile(r"(?<=://)[^/\s@'\"]*@|\?[^\s'\"<>)]*")


def parse_location(text: str) -> str:
    """The address in its one spelling (no slash at the end), or the path as it is.

    Errors:
        DataError: an address of another kind, or one that carries a user, password, query or fragment.
    """
    if _ONE_SLASH.match(text):
        scheme, _, rest = text.partition(":/")
        raise DataError(f"{text}: an address has two slashes: {scheme}://{rest}")
    if "://" not in text:
        return text
    scheme = text.partition("://")[0].lower()
    if scheme == "file" and "::" not in text:
        return text.partition("://")[2]
    if scheme == "gcs":
        scheme = "gs"
    if scheme not in PROTOCOLS or "::" in text:
        raise DataError(
            f"{redacted(text)}: shards are read from a folder, or from "
            f"{', '.join(f'{protocol}://' for protocol in PROTOCOLS)}"
        )
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise DataError(f"{redacted(text)}: not an address ({error})") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise DataError(
            f"{redacted(text)}: an address of shards has no user, password, `?` or `#`, because it is "
            "written into logs; credentials belong into the environment (docs/data.md, Where shards live)"
        )
    if not parts.netloc:
        raise DataError(f"{text}: no {'bucket' if scheme in ('s3', 'gs') else 'host'} in this address")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


@dataclass(frozen=True)
class Address:
    """The address of a remote folder, or of a file in it; put together and shown like a path."""

    url: str

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url


Place = Path | Address
"""Where a folder or a file lies."""


def place_of(location: str | Path | Address) -> Path | Address:
    """The path or the address that a location names; errors as in `parse_location`."""
    if not isinstance(location, str):
        return location
    text = parse_location(location)
    return Address(text) if "://" in text else Path(text)


def redacted(text: str) -> str:
    """The text without what may be secret in the addresses that it holds: users, passwords, queries."""
    return _SECRETS.sub(lambda found: "?…" if found[0].startswith("?") else "", text)
