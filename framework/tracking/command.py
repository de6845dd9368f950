"""`tubeworks sync`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from framework.tracking.mirror import sync_run
from framework.wording import counted

__all__ = ["sync_command"]


def sync_command(run: Path, settle: bool = True, *, as_json: bool = False) -> None:
    """Send what MLflow lacks of a run, and say what was sent; without `settle` the run goes on elsewhere.

    Errors:
        TubeworksError: see `sync_run`.
    """
    from rich.console import Console

    report = sync_run(run, settle)
    if as_json:
        Console().out(json.dumps({"run": str(run), **asdict(report)}, indent=2), highlight=False)
        return
    Console(highlight=False, soft_wrap=True).print(
        f"sent {counted(report.points, 'point')} and {counted(report.files, 'file')} of {run} to MLflow run "
        f"{report.run_id} at {report.uri}",
        markup=False,
    )
