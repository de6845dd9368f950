"""Inputs given as one line of text, for several inputs in one set of mixed shards.

`k400=kinetics:videos=DIR,annotations=CSV,split=train` or `cifar10=folder:input=DIR,split=train`; both take
`classes=FILE`, and a folder takes `kind=image` or `kind=video`.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_tools.importers.classes import read_classes
from data_tools.importers.folder import collect_folder
from data_tools.importers.kinetics import collect_kinetics
from data_tools.items import Collection
from framework.errors import DataError

__all__ = ["collect_input"]

_OPTIONS = {
    "kinetics": {"videos", "annotations", "split", "classes"},
    "folder": {"input", "split", "classes", "kind"},
}
_REQUIRED = {"kinetics": ("videos", "annotations", "split"), "folder": ("input",)}
_EXAMPLE = "k400=kinetics:videos=DIR,annotations=CSV,split=train or cifar10=folder:input=DIR"
# A comma separates only where an option's name follows: paths may hold commas.
_SEPARATOR = re.compile(r",(?=(?:videos|annotations|split|classes|input|kind)=)")


def collect_input(text: str) -> Collection:
    """The collection that `text` describes; DataError that says what is wrong with the text or the input."""
    head, colon, tail = text.partition(":")
    name, equals, form = head.partition("=")
    if not colon or not equals or form not in _OPTIONS:
        raise DataError(f"--input {text!r}: write it as NAME=kinetics:… or NAME=folder:…, as in {_EXAMPLE}")
    options: dict[str, str] = {}
    for part in _SEPARATOR.split(tail):
        option, equals, value = part.partition("=")
        if option not in _OPTIONS[form] or not equals or not value:
            known = ", ".join(sorted(_OPTIONS[form]))
            raise DataError(
                f"--input {text!r}: {part!r} is no option of {form}; it takes {known} (OPTION=VALUE)"
            )
        options[option] = value
    if absent := [option for option in _REQUIRED[form] if option not in options]:
        raise DataError(f"--input {text!r}: lacks {', '.join(absent)}, as in {_EXAMPLE}")
    if form == "kinetics":
        return _kinetics(name, options)
    return _folder(text, name, options)


def _kinetics(name: str, options: dict[str, str]) -> Collection:
    classes = read_classes(Path(options["classes"]), name, "video") if "classes" in options else None
    videos, annotations = Path(options["videos"]), Path(options["annotations"])
    return collect_kinetics(videos, annotations, name, split=options["split"], classes=classes)


def _folder(text: str, name: str, options: dict[str, str]) -> Collection:
    kind = options.get("kind")
    if kind not in (None, "image", "video"):
        raise DataError(f"--input {text!r}: kind is image or video, not {kind!r}")
    path, split = Path(options["input"]), options.get("split", "train")
    classes = Path(options["classes"]) if "classes" in options else None
    return collect_folder(path, name, split=split, kind=kind, classes_from=classes)
