"""Names and values as MLflow takes them."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["flatten", "parameter_value", "safe_name"]

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


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and texts; lists of plain values stay one value, others are numbered."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    if _is_list(value) and any(isinstance(inner, Mapping) for inner in value):
        flat = {}
        for number, inner in enumerate(value):
            flat.update(flatten(inner, f"{prefix}.{number}"))
        return flat
    return {safe_name(prefix): parameter_value(value)} if prefix else {}


def parameter_value(value: Any) -> str:
    """A value as text, at most 6000 characters."""
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif _is_list(value):
        text = f"[{', '.join(parameter_value(inner) for inner in value)}]"
    else:
        text = str(value)
    return text if len(text) <= VALUE_LENGTH else text[: VALUE_LENGTH - 1] + "…"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
