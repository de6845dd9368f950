"""The command line of `tubeworks import`, `export` and `predict`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from framework.errors import TubeworksError
from framework.wording import counted

__all__ = ["add_exchange_commands"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
SourceName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--source", help="Whose classifier; only needed where the recipe has several sources."),
]
Patterns = Optional[str]  # noqa: UP045


class To(str, Enum):
    """What `tubeworks export` writes."""

    safetensors = "safetensors"
    hf = "hf"
    timm = "timm"
    npz = "npz"
    torchvision = "torchvision"
    onnx = "onnx"


class Kept(str, Enum):
    """Which weights are taken."""

    ema = "ema"
    raw = "raw"


KeptWeights = Annotated[
    Optional[Kept],  # noqa: UP045
    typer.Option("--weights", help="Averaged or raw weights; averaged ones by default where there are any."),
]


def add_exchange_commands(app: typer.Typer) -> None:
    """Add the commands to the root."""
    app.command("import")(import_command)
    app.command("export")(export_command)
    app.command("predict")(predict_command)


def import_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Weights of timm, Hugging Face, Google, torchvision.")
    ],
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe whose model they are for.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the recipe."),
    ] = None,
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--run", help="Folder of the new run; by default runs/NAME of the recipe."),
    ] = None,
    source: SourceName = None,
    new: Annotated[
        Patterns, typer.Option(help="Our tensors that the file need not have: 'heads*,pool*'.")
    ] = None,
    unused: Annotated[
        Patterns, typer.Option(help="The file's tensors that may be left out: 'head*'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run of another library's weights; every tensor is accounted for."""
    from framework.exchange.importing import account_table, import_weights
    from framework.recipe import load_recipe

    folder = run or Path("runs") / load_recipe(recipe, overrides or ()).recipe.name
    done = import_weights(
        file, recipe, overrides or (), folder, source=source, new=_split(new), unused=_split(unused)
    )
    if as_json:
        _print_json(done.as_dict())
        return
    typer.echo(f"{file} ({done.known.title}) is the run {folder} now:\n{account_table(done.account)}")


def export_command(
    run: Run,
    to: Annotated[To, typer.Option("--to", help="What to write.")] = To.safetensors,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="A new folder; by default RUN/exports/step-N-FORM."),
    ] = None,
    weights: KeptWeights = None,
    source: SourceName = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's newest weights for other libraries, with recipe and model card."""
    from framework.exchange.exporting import export_run
    from framework.exchange.run import open_finished

    kept = weights.value if weights else None
    if out is None:
        finished = open_finished(run, kept)
        parts = [
            f"step-{finished.step:08d}",
            to.value,
            *([source] if source else []),
            *([kept] if kept else []),
        ]
        out = run / "exports" / "-".join(parts)
    done = export_run(run, to.value, out, weights=kept, source=source)
    if as_json:
        _print_json(done.as_dict())
        return
    typer.echo(f"{done.folder}: {', '.join(done.files)} ({done.weights} weights of step {done.step})")


def predict_command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of the run, or of an export `--to safetensors`.")
    ],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Videos and images.")],
    source: SourceName = None,
    weights: KeptWeights = None,
    views: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TxS", help="Temporal and spatial views; by default the recipe's."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="So many classes of each file.")] = 5,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cpu, cuda, cuda:1; by default a GPU where there is one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Classify videos and images with a run's newest weights, or with an export."""
    from framework.exchange.evaluate import parse_views
    from framework.exchange.predict import Predictor
    from framework.exchange.run import recipe_of

    kept = weights.value if weights else None
    settings = parse_views(views, recipe_of(run).evaluation)
    shape = (settings.temporal_views, settings.spatial_views)
    predictor = Predictor(run, source=source, weights=kept, views=shape, device=device)
    failed, found = [], []
    for file in files:
        try:
            prediction = predictor(file, top)
        except TubeworksError as error:
            failed.append(error)
            typer.echo(f"error: {error}", err=True)
            continue
        found.append(prediction)
        if not as_json:
            shown = counted(prediction.views, "view")
            typer.echo(f"{file}  ({prediction.source}, {shown}, {prediction.device})")
            for answer in prediction.answers:
                head = f"{answer.head}: " if answer.head else ""
                typer.echo(f"  {answer.probability:6.1%}  {head}{answer.label}")
    if as_json:
        _print_json([prediction.as_dict() for prediction in found])
    if failed:
        raise typer.Exit(failed[0].exit_code)


def _split(patterns: str | None) -> list[str]:
    return [part.strip() for part in (patterns or "").split(",") if part.strip()]


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
