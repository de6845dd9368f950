"""The outcome of an evaluation: as a file, as metrics, and as a table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.errors import TubeworksError
from framework.evaluation.run import AnyResult, HeadsResult, MultiLabelResult, SourceResult
from framework.files import replace_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EvaluationReport", "show_table", "write_report"]


@dataclass(frozen=True)
class EvaluationReport:
    """What was evaluated, how, and what came out."""

    run: str
    recipe: str
    step: int
    weights: str
    """`ema` or `raw`"""
    views: tuple[int, int]
    """Temporal and spatial."""
    recipe_views: tuple[int, int]
    shuffle_frames: bool
    ranks: int
    precision: str
    sources: Mapping[str, AnyResult]
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def variant(self) -> list[str]:
        """In what it differs from the evaluations that training does by itself."""
        parts = ["ema"] if self.weights == "ema" else []
        if self.views != self.recipe_views:
            parts.append(f"{self.views[0]}x{self.views[1]}")
        return [*parts, "shuffled"] if self.shuffle_frames else parts

    def metrics(self) -> dict[str, float]:
        """By their names in the journal: `eval/<source>/top_1`, `eval_shuffled/<source>/top_1`, …"""
        prefix = "_".join(["eval", *self.variant])
        return {
            f"{prefix}/{source}/{name}": value
            for source, result in self.sources.items()
            for name, value in result.metrics().items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become None."""
        return _finite(asdict(self))


def write_report(run: Path, report: EvaluationReport) -> Path:
    """Write `RUN/evaluations/step-….json`, in one piece; returns its path.

    Errors:
        TubeworksError: the file cannot be written.
    """
    name = "-".join([f"step-{report.step:08d}", *report.variant]) + ".json"
    path = run / "evaluations" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise TubeworksError(
            f"{path} cannot be written: {error.strerror or error}. Free space or grant write permission"
        ) from error
    return path


def show_table(report: EvaluationReport) -> None:
    """Print the results to the terminal."""
    from rich.console import Console

    kind = "averaged" if report.weights == "ema" else "raw"
    views = f"{report.views[0]}x{report.views[1]} views"
    title = f"{report.recipe}, step {report.step}, {kind} weights, {views}"
    title += ", frames shuffled" if report.shuffle_frames else ""
    parts = [
        _table(("top-1", "top-5", "top-1 softmax", "mean class", "loss"), _one_class_rows(report.sources)),
        _table(("mAP", "sigmoid", "best view", "hit@1", "no positives", "loss"), _many_rows(report.sources)),
    ]
    console = Console()
    for table in parts:
        if table.row_count:
            table.title, table.title_justify = title, "left"
            console.print(table)


Row = tuple[str, int, tuple[str, ...]]


def _table(columns: Sequence[str], rows: Iterable[Row]) -> Table:
    from rich.table import Table

    table = Table("source")
    for column in ("samples", *columns):
        table.add_column(column, justify="right")
    for name, samples, cells in rows:
        table.add_row(name, str(samples), *cells)
    return table


def _one_class_rows(sources: Mapping[str, AnyResult]) -> Iterator[Row]:
    """Rows of the sources with one class for a sample, and of all heads, alone and together."""
    for name, result in sources.items():
        if isinstance(result, HeadsResult):
            shares = (f"{share:.1%}" for share in (result.top1, result.top5, result.top1_softmax))
            yield f"{name}, all heads", result.samples, (*shares, "", f"{result.loss:.4f}")
        singles = result.heads.items() if isinstance(result, HeadsResult) else [("", result)]
        for head, single in singles:
            if isinstance(single, SourceResult):
                numbers = (single.top1, single.top5, single.top1_softmax, single.mean_class_accuracy)
                cells = (*(f"{share:.1%}" for share in numbers), f"{single.loss:.4f}")
                yield f"{name}, {head}" if head else name, single.samples, cells


def _many_rows(sources: Mapping[str, AnyResult]) -> Iterator[Row]:
    """Rows of the multi-label sources."""
    for name, result in sources.items():
        if isinstance(result, MultiLabelResult):
            shares = (
                result.mean_average_precision,
                result.mean_average_precision_sigmoid,
                result.mean_average_precision_max,
                result.hit1,
            )
            without = str(result.classes_without_positives)
            yield name, result.samples, (*(f"{s:.1%}" for s in shares), without, f"{result.loss:.4f}")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
