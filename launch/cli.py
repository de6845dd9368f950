"""The command line `tubeworks`: names, options and help; the work is done elsewhere.

Whatever takes long to import (torch, DeepSpeed, MLflow, pydantic) is imported inside the commands, so that
`tubeworks --help` answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from data_tools.cli import app as data_app
from framework import __version__
from framework.errors import TubeworksError
from framework.world import World
from launch.checkpoint_cli import checkpoint_app
from launch.commands import app as launch_app
from launch.exchange_cli import add_exchange_commands
from launch.streams import outlive_reader

__all__ = ["app", "main"]


# what to do about errors of the system that no command has put into words of its own
_ADVICE = {
    errno.EACCES: "check the path",
    errno.ENAMETOOLONG: "check the path",
    errno.ENOSPC: "make room there and start again; what was finished stays",
    errno.EDQUOT: "make room in the quota and start again; what was finished stays",
    errno.EIO: "the disk or its connection fails; look at the system's log",
    errno.EROFS: "choose another place",
}


class _Root(TyperGroup):
    """Turns what commands raise into messages and exit codes; a defect keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and leave with the code of what went wrong."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except TubeworksError as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:
            # whoever read our output has left; Python must not complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno not in _ADVICE:
                raise
            what = error.filename
            if what is None:  # files are named, what is printed has no name
                what = "cannot write the output"
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            typer.echo(f"error: {what}: {error.strerror}; {_ADVICE[error.errno]}", err=True)
            sys.exit(1)
        return result


class _Lines(logging.Formatter):
    """What is told stands alone; warnings and worse say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


app = typer.Typer(
    cls=_Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(no_args_is_help=True, help="Look at recipes.")
app.add_typer(data_app, name="data")
app.add_typer(launch_app, name="launch")
app.add_typer(recipe_app, name="recipe")
app.add_typer(checkpoint_app, name="ckpt")
add_exchange_commands(app)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Path of a recipe, or name of an installed one.")
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer evaluates it on Python 3.10
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's: train.steps=100."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tubeworks {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pretrain joint image-and-video transformers from shards, on DeepSpeed, recorded in MLflow."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in ("framework", "launch", "data_tools"):
        logging.getLogger(package).setLevel(logging.INFO)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Processes on this machine; by default one per GPU, or one without."),
    ] = None,
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the run, by default runs/NAME; an existing one is continued."),
    ] = None,
) -> None:
    """Train a recipe, or go on where its run folder stopped.

    Under torchrun or srun the processes come from their environment.
    """
    from launch.local import train_command

    raise typer.Exit(train_command(recipe, overrides or [], ranks, run))


@app.command("eval")
def evaluate(
    run: Run,
    views: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TxS", help="Temporal x spatial views, such as 4x3; by default the recipe's."),
    ] = None,
    shuffle_frames: Annotated[
        bool,
        typer.Option("--shuffle-frames", help="Shuffle each clip's frames: what is left does not read time."),
    ] = False,
    ranks: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Processes on this machine; by default one."),
    ] = None,
    weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="ema|raw", help="Averaged or raw weights; by default averaged where there are any."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the newest checkpoint of a run on its held-out shards."""
    if ranks is not None and ranks > 1 and World.from_env() is None:
        options = {"--views": views, "--weights": weights}
        arguments = [part for name, value in options.items() if value is not None for part in (name, value)]
        switches = {"--shuffle-frames": shuffle_frames, "--json": as_json}
        arguments += [name for name, wanted in switches.items() if wanted]
        raise typer.Exit(_evaluate_on_ranks(run, ranks, arguments))
    from framework.exchange.evaluate import evaluate_command

    evaluate_command(
        run, views=views, shuffle_frames=shuffle_frames, ranks=ranks, weights=weights, as_json=as_json
    )


def _evaluate_on_ranks(run: Path, ranks: int, arguments: list[str]) -> int:
    from launch.local import run_ranks

    if not run.is_dir():
        raise TubeworksError(f"there is no run folder {run}")
    return run_ranks(["eval", str(run), *arguments], ranks, run / "logs")


@app.command()
def describe(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="MODEL|RECIPE", help="Name of a model, or a recipe."),
    ] = None,
    overrides: Overrides = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Find tube sets that read most of a clip; MODEL is tubevit_b by default."
        ),
    ] = False,
    gmac: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="With --search: at most so many 1e9 multiply-adds a clip."),
    ] = None,
    hardware: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="GPU|FILE",
            help="Forecast time, memory and bottleneck on a100, h100, h200, or the GPU of a results file.",
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="With --hardware.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="With --hardware.")] = 8,
    decode_ms: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="SOURCE=MS", help="With --hardware: processor time that a sample costs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model is: tubes, tokens, parameters and FLOPs; and what a run will need."""
    if gmac is not None and not search:
        raise typer.BadParameter("is the budget of --search, which is missing", param_hint="--gmac")
    if name is None and not search:
        raise typer.BadParameter("name a model such as tubevit_b, or a recipe", param_hint="MODEL|RECIPE")
    ignored = {"--nodes": nodes != 1, "--gpus-per-node": gpus_per_node != 8, "--decode-ms": bool(decode_ms)}
    for option, given in ignored.items():
        if given and hardware is None:
            raise typer.BadParameter("needs --hardware", param_hint=option)
    if search and hardware is not None:
        raise typer.BadParameter("does not go with --hardware", param_hint="--search")
    if hardware is not None:
        from framework.forecast.command import forecast_command

        around = {"nodes": nodes, "gpus_per_node": gpus_per_node, "decode_ms": decode_ms or []}
        forecast_command(name or "", overrides or [], hardware, **around, as_json=as_json)
        return
    from framework.models.describe import describe_command, search_command

    if search:
        search_command(name or "tubevit_b", overrides or [], gmac=gmac, as_json=as_json)
    else:
        describe_command(name or "", overrides or [], as_json=as_json)


@app.command()
def pictures(run: Run, as_json: AsJson = False) -> None:
    """Draw what a run's newest checkpoint has learned: kernels, what its tubes read, positions."""
    from framework.exchange.pictures import pictures_command

    drawn = [str(path) for path in pictures_command(run)]
    typer.echo(json.dumps({"pictures": drawn}, indent=2) if as_json else "\n".join(drawn))


@app.command()
def sync(run: Run, as_json: AsJson = False) -> None:
    """Send what the journal of a run holds and MLflow does not have yet."""
    from framework.tracking import sync as sync_run
    from launch.following import job_is_active

    sync_run(run, settle=not job_is_active(run), as_json=as_json)


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the whole recipe, and for each value where it comes from."""
    from framework.recipe import load_recipe
    from framework.recipe.show import report, show

    resolved = load_recipe(recipe, overrides or ())
    typer.echo(json.dumps(report(resolved), indent=2) if as_json else show(resolved).rstrip("\n"))


@recipe_app.command("list")
def recipe_list(as_json: AsJson = False) -> None:
    """Print the names of the installed recipes and what they are."""
    from framework.recipe import load_recipe, recipe_names

    found = {name: load_recipe(name).recipe.description for name in recipe_names()}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found), default=0)
    for name, description in found.items():
        typer.echo(f"{name:<{width}}  {description}".rstrip())


def main() -> None:
    """Run the command line; leaves the process with the exit code."""
    outlive_reader()
    try:
        app()
    except SystemExit as leaving:
        if "torch.distributed" in sys.modules:
            _leave(leaving.code)
        raise


def _leave(code: object) -> None:
    """End the process without taking the interpreter apart, when all is written and closed.

    Threads of gloo and of others live to the end, and one that meets a half dismantled interpreter aborts
    the process: a training that was saved would look like a crash.
    """
    logging.shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
