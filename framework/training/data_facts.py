"""What a run keeps about its sources: manifests, and the names of the classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.data.sources import OpenSource
from framework.errors import TubeworksError
from framework.files import replace_text
from framework.training.storage import explain_os_error

__all__ = ["read_data_facts", "write_data_facts"]

DATA_NAME = "data.json"
MOST_CLASSES = 1_000_000
"""More names than these are not copied to the run folder."""


def write_data_facts(run: Path, sources: Mapping[str, OpenSource]) -> None:
    """Keep manifests and names of classes with the run (rank 0), for when its shards are far away.

    The names of several heads stand one behind the other, as their logits do.
    """
    facts = {}
    for name, opened in sources.items():
        classes = [entry for part in class_lists(opened) for entry in part]
        facts[name] = {
            "manifest": opened.manifest.hash,
            "dataset": opened.dataset.name,
            "samples": len(opened),
            "classes": classes if len(classes) <= MOST_CLASSES else [],
        }
    with explain_os_error(run / DATA_NAME):
        replace_text(run / DATA_NAME, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")


def read_data_facts(run: Path) -> dict[str, dict[str, Any]]:
    """What a run kept about each source; nothing where it was never trained.

    Errors:
        TubeworksError: the file is damaged.
    """
    path = run / DATA_NAME
    if not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): dict(facts) for name, facts in kept.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise TubeworksError(f"{path} cannot be read ({error}); restore or remove it") from error


def class_lists(opened: OpenSource) -> list[tuple[str, ...]]:
    """The class names of each head of a source; one list where it has no heads."""
    heads = opened.dataset.heads
    return [head.classes for head in heads] if heads else [opened.dataset.classes]
