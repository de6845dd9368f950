"""Names and values as MLflow takes them."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["parameter_value", "safe_name"]

NAME_LENGTH = 250
VALUE_LENGTH = 6000


def safe_name(name: str) -> str:
    """A name that MLflow accepts for metrics, parameters and tags: `top@1` becomes `top_1`.

    Letters, digits and `_ - . / space` stay; everything else becomes `_`; the parts between slashes are never
    empty or dots alone. Longer names are cut and end in a digest of the whole one.
    """
    clean = re.sub(r"[^\w\-. /]", "_", name)
    parts = [re.sub(r"^\.+$", lambda dots: "_" * len(dots[0]), part) for part in clean.split("/") if part]
    clean = posixpath.normpath("/".join(parts)) if parts else "_"
    if len(clean) > NAME_LENGTH:
        digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
        clean = f"{clean[: NAME_LENGTH - len(digest) - 1]}-{digest}"
    return clean


def parameter_value(value: Any) -> str:
    """A value as text, at most 6000 characters."""
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        text = f"[{', '.join(parameter_value(inner) for inner in value)}]"
    else:
        text = str(value)
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"
