"""`tubeworks data quarantine …` and `tubeworks data audit`: what a run goes without, and what it was fed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, List, Optional  # noqa: UP035 - evaluated by typer on 3.10

import typer

from data_tools.cli_options import AsJson, print_json
from framework.errors import DataError
from framework.wording import counted

if TYPE_CHECKING:
    from framework.data.quarantine import Quarantined

__all__ = ["audit", "quarantine_app"]

quarantine_app = typer.Typer(
    no_args_is_help=True, help="List the samples that a run goes without; take more out, or let them back in."
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
Keys = Annotated[List[str], typer.Argument(metavar="KEY…", help="Keys of samples.")]  # noqa: UP006
SourceName = Annotated[str, typer.Option("--source", help="Source of the recipe that they belong to.")]
FromStep = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--from-step", min=0, help="First step that changes; by default that of the newest checkpoint."
    ),
]


@quarantine_app.command("list")
def quarantine_list(run: Run, as_json: AsJson = False) -> None:
    """List the samples that the run goes without, and why."""
    from dataclasses import asdict

    from framework.data.quarantine import read_quarantine

    _check_run(run)
    quarantine = read_quarantine(run)
    held = quarantine.held(max((entry.from_step for entry in quarantine.entries), default=0))
    if as_json:
        print_json([asdict(entry) for entry in held])
        return
    for entry in held:
        place = f"shard {entry.shard}, offset {entry.offset}"
        typer.echo(f"{entry.source}  {entry.key}  from step {entry.from_step}  {place}  {entry.reason}")
    typer.echo(f"{counted(len(held), 'sample', 'no')} in quarantine")


@quarantine_app.command("add")
def quarantine_add(
    run: Run,
    keys: Keys,
    source: SourceName,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the record.")] = "taken out by hand",
    from_step: FromStep = None,
    as_json: AsJson = False,
) -> None:
    """Take samples out of a run that is not training; the plan's substitutes take their places."""
    from framework.data.quarantine import Quarantined, append_quarantine

    with _idle(run):
        step = _first_step(run, from_step)
        found = _samples(run, source, keys)
        entries = [
            Quarantined(source, index, info.key, info.shard, info.offset, reason, step)
            for index, info in found
        ]
        append_quarantine(run, entries)
    _say(entries, "is out", "are out", as_json)


@quarantine_app.command("remove")
def quarantine_remove(
    run: Run, keys: Keys, source: SourceName, from_step: FromStep = None, as_json: AsJson = False
) -> None:
    """Let samples back into a run that does not train at the moment, once their shards are restored."""
    from dataclasses import replace

    from framework.data.quarantine import append_quarantine, read_quarantine

    with _idle(run):
        step = _first_step(run, from_step)
        held = {entry.key: entry for entry in read_quarantine(run).held(2**62) if entry.source == source}
        if missing := [key for key in keys if key not in held]:
            raise DataError(
                f"{run}: not in quarantine: {', '.join(missing)} of source {source}; "
                f"`tubeworks data quarantine list {run}` shows what is"
            )
        entries = [replace(held[key], from_step=max(step, held[key].from_step), lifted=True) for key in keys]
        append_quarantine(run, entries)
    _say(entries, "is back", "are back", as_json)


def audit(run: Run, as_json: AsJson = False) -> None:
    """Prove from the ledger what the run was fed: every sample exactly once per source and epoch."""
    from data_tools.auditing import audit_run, audit_text

    _check_run(run)
    content = audit_run(run)
    if as_json:
        print_json(content)
    else:
        typer.echo(audit_text(content))
    if content["problems"]:
        raise typer.Exit(DataError.exit_code)


def _say(entries: list[Quarantined], one: str, several: str, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        print_json([asdict(entry) for entry in entries])
        return
    for step in sorted({entry.from_step for entry in entries}):
        count = sum(entry.from_step == step for entry in entries)
        typer.echo(f"{count} {'sample ' + one if count == 1 else 'samples ' + several} from step {step} on")


def _check_run(run: Path) -> None:
    if not (run / "recipe.yaml").is_file():
        raise DataError(f"{run} is not the folder of a run: it has no recipe.yaml; check the path")


@contextmanager
def _idle(run: Path) -> Iterator[None]:
    """Keep trainings out of the run meanwhile: one that works would not see the change, and contradict it."""
    from framework.tracking.lock import RunLock

    _check_run(run)
    lock = RunLock(run, ".training.lock")
    try:
        taken = lock.acquire()
    except OSError as error:
        raise DataError(f"{lock.path}: {error.strerror}; the run folder must be writable") from error
    if not taken:
        raise DataError(
            f"a training works in {run}: stop it (it saves a checkpoint), then change the quarantine"
        )
    try:
        yield
    finally:
        lock.release()


def _first_step(run: Path, asked: int | None) -> int:
    """The step that changes first, which no checkpoint may have behind it."""
    from framework.training.checkpoint_manifest import checkpoint_folders

    folders = checkpoint_folders(run)
    done = int(folders[-1].name.removeprefix("step-")) if folders else 0
    if asked is None:
        return done
    if asked < done:
        raise DataError(
            f"{run}: step {asked} is trained already, the newest checkpoint is of step {done}: name a step "
            f"from {done} on. To train step {asked} again, remove the checkpoints behind it first"
        )
    return asked


def _samples(run: Path, source: str, keys: list[str]) -> list[tuple[int, Any]]:
    """(index in the source's selection, manifest entry) of the samples with these keys."""
    from framework.data.sources import open_sources
    from framework.recipe import load_recipe

    sources = open_sources(load_recipe(str(run / "recipe.yaml")).recipe)
    if source not in sources:
        raise DataError(f"{run}: no source {source!r} in the mixture; there is {', '.join(sources)}")
    opened = sources[source]
    wanted, found = set(keys), {}
    for index in range(len(opened)):
        info = opened.manifest.sample(int(opened.selection[index]))
        if info.key in wanted:
            found[info.key] = (index, info)
    if missing := [key for key in keys if key not in found]:
        raise DataError(
            f"{opened.manifest.folder}: no sample {', '.join(missing)} in data set {opened.dataset.name!r}; "
            "`tubeworks data plan` and RUN/events.jsonl show keys"
        )
    return [found[key] for key in dict.fromkeys(keys)]
