"""`tubeworks launch …`: names, options and help; the work is done elsewhere, and imported when it is done."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from data_tools.cli_options import AsJson, grouped, refuse_given
from framework.wording import counted
from launch.wishes import QueueWishes, Wishes

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Submit runs to Slurm, watch them, stop them.")

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Path of a recipe, or name of an installed one.")
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer evaluates it on Python 3.10
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the recipe's: train.steps=100."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
Site = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--site", help="File of defaults, by default ~/.config/tubeworks/site.yaml."),
]
RunFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--run", help="Folder of the run, by default NAME in the site's `runs`."),
]


@app.command()
@grouped
def submit(
    recipe: Recipe,
    wishes: Wishes,
    overrides: Overrides = None,
    run: RunFolder = None,
    site: Site = None,
    local: Annotated[
        bool,
        typer.Option("--local", help="Train on this machine, the same way, on --ranks-per-node ranks."),
    ] = False,
    array: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KEY=VALUE,VALUE", help="A run for each value (of several keys: combination)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fix a run in its folder (recipe, code, MLflow run) and submit it to Slurm."""
    if array:
        if local:
            raise typer.BadParameter("needs Slurm; leave --local away", param_hint="--array")
        from launch.sweep import submit_sweep

        _say_swept(submit_sweep(recipe, overrides or [], array, wishes, site, run), as_json)
        return
    if local:
        why = "asked of Slurm, but --local trains on this machine; --ranks-per-node goes with both"
        refuse_given(wishes.of_slurm(), why)
    from launch.submit import prepare_run, submit_prepared

    submission = prepare_run(recipe, overrides or [], wishes, site, run, local=local)
    if local:
        from launch.local_host import supervise_here

        code = supervise_here(submission)
        if as_json:
            typer.echo(json.dumps({**asdict(submission), "exit_code": code}))
        raise typer.Exit(code)
    _say_submitted(submit_prepared(submission), as_json)


@app.command()
@grouped
def plan(
    recipe: Recipe,
    wishes: Wishes,
    overrides: Overrides = None,
    run: RunFolder = None,
    site: Site = None,
    hardware: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="GPU|FILE", help="For runs that never ran: as `tubeworks describe` takes it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what `submit` would do: the script, start, steps and epochs, GPU-hours, room; and what would fail.

    Nothing is submitted.
    """
    from launch.plan import plan_run
    from launch.plan_page import show_plan

    found = plan_run(recipe, overrides or [], wishes, site, run, hardware)
    typer.echo(json.dumps(found.as_dict()) if as_json else show_plan(found))
    for problem in found.problems:
        typer.echo(f"error: {problem}", err=True)
    raise typer.Exit(found.exit_code)


@app.command()
@grouped
def resubmit(
    run: Run,
    wishes: Wishes,
    new_code: Annotated[
        bool, typer.Option("--new-code", help="Take the code as it is now, not as it was submitted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run again where it stopped, on other nodes or with other limits."""
    from launch.submit import resubmit

    _say_submitted(resubmit(run, wishes, new_code=new_code), as_json)


@app.command()
def status(
    run: Annotated[Optional[Path], typer.Argument(metavar="RUN", help="By default all of yours.")] = None,  # noqa: UP045
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until it has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how a run is doing, and why it waits or ended."""
    if run is None:
        list_runs(None, as_json)
        return
    from launch.status import show_status, status_of

    while True:
        found = status_of(run)
        typer.echo(json.dumps(found.as_dict()) if as_json else show_status(found))
        if not watch or not found.active:
            return
        sys.stdout.flush()
        time.sleep(10)
        typer.echo("")


@app.command("list")
def list_runs(
    folders: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(metavar="FOLDER", help="Folders of run folders, by default the site's `runs`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs: those in the queue, and those in folders."""
    from launch.site import load_site
    from launch.status import runs_of_user, show_list

    found = runs_of_user(folders or [Path(load_site(None).runs)])
    typer.echo(json.dumps([one.as_dict() for one in found]) if as_json else show_list(found))


@app.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Of which rank.")] = 0,
    batch: Annotated[
        bool, typer.Option("--batch", help="Of the batch script: attempts and decisions.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the end of a rank's output."""
    from launch.following import job_is_active, log_file, log_lines

    path = log_file(run, None if batch else rank)
    for text in log_lines(path, follow, lambda: job_is_active(run)):
        if as_json:
            for line in text.splitlines():
                typer.echo(json.dumps({"file": str(path), "line": line}))
        else:
            typer.echo(text, nl=False)
        sys.stdout.flush()


@app.command()
def cancel(run: Run, as_json: AsJson = False) -> None:
    """Cancel a run for good; its checkpoints stay."""
    from launch.following import cancel_run

    said = cancel_run(run)
    typer.echo(json.dumps({"run": str(run), "done": said}) if as_json else said)


@app.command()
@grouped
def shard(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The --out of `data shard … --plan-only`.")],
    wishes: QueueWishes,
    tasks: Annotated[int, typer.Option(min=1, max=1000, help="Jobs of the array.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each, a core for each.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
    site: Site = None,
    as_json: AsJson = False,
) -> None:
    """Make the shards of a plan in an array of jobs, and join them; run it again to go on.

    Every job is one task on one node.
    """
    from launch.shard_array import submit_shards

    found = submit_shards(out, tasks, workers, wishes, site, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    typer.echo(
        f"{counted(found.shards, 'shard')} in {counted(len(found.jobs), 'job')}: {' '.join(found.jobs)}"
    )
    typer.echo(f"job {found.last_job} joins them to {found.out}; output: {found.logs}")


@app.command()
def doctor(site: Site = None, as_json: AsJson = False) -> None:
    """Say what the settings of this cluster mean for runs, and what to change."""
    from launch.doctor import diagnose, show_findings
    from launch.site import load_site

    found = diagnose(load_site(site))
    typer.echo(json.dumps([one.as_dict() for one in found]) if as_json else show_findings(found))


@app.command("ctl")
def control(
    run: Run,
    command: Annotated[
        Literal["checkpoint", "stack", "profile", "stop", "exclude"],
        typer.Argument(help="What the training is asked for."),
    ],
    argument: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="STEPS|NODE", help="Steps of `profile` (3), or the node of `exclude`."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Ask a running training to save, stop, show its stacks, profile some steps, or leave a node.

    `stack` works while the job hangs. `exclude` saves, ends the attempt and keeps NODE out of the next one.
    """
    from launch.control import control_command

    control_command(run, command, argument, wait, as_json)


def _say_swept(submissions: list[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in submissions]))
        return
    for one in submissions:
        typer.echo(f"job {one.job_id}: {one.run}")
    typer.echo(f"watch them with `tubeworks launch list {Path(submissions[0].run).parent}`")


def _say_submitted(submission: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(submission)))
        return
    ranks = counted(submission.ranks, "rank")
    typer.echo(f"job {submission.job_id}: {submission.name} on {ranks}, in {submission.run}")
    typer.echo(f"watch it with `tubeworks launch status {submission.run}`")
