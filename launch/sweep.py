"""`launch submit --array "optimizer.lr=1e-4,3e-4"`: a run for each combination of values, one array of jobs.

SWEEP/sweep.json   the elements: overrides and folder of each, the array's job, the parent MLflow run
SWEEP/NAME/        the run folder of an element, complete: it can be watched, cancelled, resubmitted alone
SWEEP/code/        the code that all elements run
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from framework.errors import RecipeError, TubeworksError
from framework.files import replace_text
from launch.site import load_site
from launch.snapshot import take_snapshot
from launch.submission import Submission, write_submission
from launch.submit import executor_of, prepare_run, slurm_errors
from launch.wishes import Wishes

__all__ = ["Element", "elements_of", "submit_sweep"]

log = logging.getLogger(__name__)

MOST = 1000
"""Slurm's usual MaxArraySize is 1001."""


@dataclass(frozen=True)
class Element:
    """One combination: `key=value` for each key that varies, and the name of its folder."""

    overrides: tuple[str, ...]
    name: str


def elements_of(array: Sequence[str]) -> list[Element]:
    """All combinations of `key=value,value,…`; commas inside brackets, braces or quotes do not separate.

    Errors:
        RecipeError: not of that form, a key or value that comes twice, or too many combinations.
    """
    keys: dict[str, list[str]] = {}
    for text in array:
        key, equals, rest = text.partition("=")
        values = [value.strip() for value in _split(rest)]
        if not (equals and key.strip() and all(values)):
            raise RecipeError(f'--array {text}: write KEY=VALUE,VALUE, such as "optimizer.lr=1e-4,3e-4"')
        if key.strip() in keys or len(set(values)) < len(values):
            raise RecipeError(f"--array {text}: a key or a value comes twice")
        keys[key.strip()] = values
    combinations = list(itertools.product(*([f"{key}={value}" for value in keys[key]] for key in keys)))
    if len(combinations) > MOST:
        raise RecipeError(f"--array: {len(combinations)} combinations are more than {MOST}")
    width = len(str(len(combinations) - 1))
    return [Element(one, f"{number:0{width}}-{_file_name(one)}") for number, one in enumerate(combinations)]


def submit_sweep(
    recipe: str,
    overrides: Sequence[str],
    array: Sequence[str],
    wishes: Wishes,
    site_file: Path | None = None,
    folder: Path | None = None,
) -> list[Submission]:
    """Fix a run for each combination in a folder of its own, and submit them as one array.

    Errors:
        RecipeError: the array, the recipe with any of its values, the site file, or a wish.
        TubeworksError: the folder holds something already.
        DataError, CheckpointError, SchedulerError: see `launch.submit`.
    """
    from framework.recipe import load_recipe

    elements = elements_of(array)
    recipes = [load_recipe(recipe, [*overrides, *one.overrides]).recipe for one in elements]  # all, at first
    folder = (folder or Path(load_site(site_file).runs) / f"{recipes[0].name}-sweep").resolve()
    if folder.exists() and any(folder.iterdir()):
        raise TubeworksError(
            f"{folder} holds a sweep already: choose another --run folder; single runs of a sweep go on with "
            "`tubeworks launch resubmit`"
        )
    submissions = [
        prepare_run(recipe, [*overrides, *one.overrides], wishes, site_file, folder / one.name)
        for one in elements
    ]
    take_snapshot(folder / "code")
    (folder / "logs").mkdir()
    for one in submissions:
        shutil.rmtree(Path(one.run) / "code")
        (Path(one.run) / "code").symlink_to("../code")
    parent = _nest(folder, submissions, array)
    submissions = _submit(folder, submissions)
    _write(folder, elements, submissions, parent)
    return submissions


def _submit(folder: Path, submissions: Sequence[Submission]) -> list[Submission]:
    """Call sbatch once, through submitit; each element learns of its job."""
    from launch.supervisor import supervise_job

    first = submissions[0]
    log_file = {"output": f"{folder}/logs/slurm-%A_%a.log"}
    executor = executor_of(replace(first, run=str(folder), sbatch={**log_file, **first.sbatch}))
    with slurm_errors(), executor.batch():
        jobs = [executor.submit(supervise_job, one.run) for one in submissions]
    done = []
    for one, job in zip(submissions, jobs, strict=True):
        one = replace(one, job_id=str(job.job_id), submitted=time.time())
        write_submission(one)
        name = f"slurm-{job.job_id}.log"
        (Path(one.run) / "logs" / name).symlink_to(folder / "logs" / name)
        done.append(one)
    return done


def _nest(folder: Path, submissions: Sequence[Submission], array: Sequence[str]) -> str | None:
    """Make the parent MLflow run and hang the others under it; None without MLflow."""
    runs = [one for one in submissions if one.mlflow_run is not None]
    if not runs:
        return None
    from mlflow import MlflowClient

    from framework.tracking.mirror import kept_settings
    from framework.tracking.sender import load_state, reason

    first = Path(runs[0].run)
    try:
        client = MlflowClient(tracking_uri=kept_settings(first).uri)
        tags = {"tubeworks.sweep": "; ".join(array)[:5000]}
        parent = client.create_run(load_state(first)["experiment_id"], tags=tags, run_name=folder.name)
        for one in runs:
            client.set_tag(str(one.mlflow_run), "mlflow.parentRunId", parent.info.run_id)
        client.set_terminated(parent.info.run_id, "FINISHED")  # it holds the others, and does nothing itself
    except Exception as error:  # noqa: BLE001 - whatever a server does, it must not prevent a submission
        log.warning("MLflow shows the runs of this sweep side by side, not nested: %s", reason(error))
        return None
    return parent.info.run_id


def _write(
    folder: Path, elements: Sequence[Element], submissions: Sequence[Submission], parent: str | None
) -> None:
    rows: list[dict[str, Any]] = [
        {**asdict(element), "run": one.run, "job_id": one.job_id, "mlflow_run": one.mlflow_run}
        for element, one in zip(elements, submissions, strict=True)
    ]
    content = {"version": 1, "mlflow_run": parent, "elements": rows}
    replace_text(folder / "sweep.json", json.dumps(content, indent=1) + "\n")


def _split(text: str) -> list[str]:
    """Parts between commas that are outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _file_name(overrides: Sequence[str]) -> str:
    """A folder's name from what is overridden: the last part of each key, and its value."""
    words = [
        f"{key.rpartition('.')[2]}={value}" for key, _, value in (one.partition("=") for one in overrides)
    ]
    return re.sub(r"[^\w.=+-]+", "_", ",".join(words)).strip("_.")[:80]
