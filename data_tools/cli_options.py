"""Groups of command-line options that several commands share.

A group is a frozen dataclass whose fields are typer options. A command takes the whole group as one parameter
and is decorated with `grouped`, which shows typer the fields instead.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional, get_type_hints

import typer

__all__ = ["AsJson", "Folder", "Seed", "Workers", "grouped", "print_json", "refuse_given"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Folder = Annotated[str, typer.Argument(metavar="DIR|URL", help="Folder of shards: a path or an address.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Decides the order of samples.")]
Workers = Annotated[
    Optional[int],  # noqa: UP045 - typer evaluates it on Python 3.10
    typer.Option("--workers", min=1, help="Processes; by default one per core."),
]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with each parameter that is a group replaced by the options in it."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not dataclasses.is_dataclass(hint) or not isinstance(hint, type):
            parameters.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))
            continue
        types = get_type_hints(hint, include_extras=True)
        fields = dataclasses.fields(hint)
        groups[parameter.name] = (hint, [field.name for field in fields])
        for field in fields:
            default = parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, parameter.KEYWORD_ONLY, default=default, annotation=types[field.name]
                )
            )

    def call(**values: Any) -> None:
        for name, (group, fields) in groups.items():
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def refuse_given(options: Mapping[str, Any], why: str) -> None:
    """Raise typer.BadParameter for options that were given (are not None, nor empty) and would be ignored."""
    if given := [name for name, value in options.items() if value not in (None, [])]:
        raise typer.BadParameter(f"{', '.join(given)}: {why}")


def print_json(content: Any) -> None:
    """`content` on the standard output, for programs."""
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False, default=str))
