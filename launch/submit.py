"""Submitting a run: all that it needs is fixed in its folder, then sbatch is called through submitit."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from framework.errors import RecipeError, SchedulerError, TubeworksError
from framework.recipe.schema import Recipe
from framework.training.elastic import fitted
from launch import slurm
from launch.bad_nodes import avoided_nodes
from launch.recipe_check import check_recipe
from launch.site import Site, load_site, minutes
from launch.snapshot import take_snapshot
from launch.submission import Submission, launch_folder, newest_step, read_submission, write_submission
from launch.wishes import Wishes

__all__ = [
    "active_job",
    "batch_script",
    "executor_of",
    "plan_submission",
    "prepare_run",
    "resubmit",
    "slurm_errors",
    "submit_prepared",
    "works_on",
]


def prepare_run(
    recipe: str,
    overrides: Sequence[str],
    wishes: Wishes,
    site_file: Path | None = None,
    run: Path | None = None,
    *,
    local: bool = False,
) -> Submission:
    """Fix a run in its folder: checked recipe, copy of the code, MLflow run; nothing is submitted yet.

    Errors:
        RecipeError: the recipe, the site file, or a wish.
        DataError: shards that are not there, or do not fit the recipe.
        TubeworksError: a job or a training works on the folder already.
        CheckpointError: the folder cannot be written.
        SchedulerError: no Slurm, or its controller does not answer.
    """
    from framework.recipe import dump_yaml, load_recipe
    from framework.recipe.paths import with_absolute_paths
    from framework.training.storage import explain_os_error, write_text

    site = load_site(site_file)
    resolved = with_absolute_paths(load_recipe(recipe, overrides).recipe, Path.cwd())
    folder = (run or Path(site.runs) / resolved.name).resolve()
    submission = plan_submission(resolved, wishes, site, folder, local=local)
    check_recipe(fitted(resolved, folder, submission.ranks), submission)
    if not submission.local and not slurm.is_available():
        raise slurm.SlurmMissing(
            "there is no Slurm on this machine: submit from a login node, or use `--local` to train here"
        )
    refuse_if_active(folder)
    check_folder(folder, resolved)
    with explain_os_error(folder):
        launch_folder(folder).mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
    git = take_snapshot(folder / "code")
    write_text(launch_folder(folder) / "recipe.yaml", dump_yaml(resolved))
    if not (folder / "recipe.yaml").exists():
        write_text(folder / "recipe.yaml", dump_yaml(resolved))
    submission = replace(submission, git=git, mlflow_run=register(folder, resolved, git))
    write_submission(submission)
    return submission


def plan_submission(
    recipe: Recipe, wishes: Wishes, site: Site, folder: Path, *, local: bool = False
) -> Submission:
    """What will be asked of Slurm, or is done here: the wishes, and the site's defaults for the rest.

    Errors:
        RecipeError: a wish that makes no sense, or a folder's name that cannot be given to what starts ranks.
    """
    said = site.model_dump() | wishes.given()
    try:
        limit = minutes(said["time"])
    except ValueError as error:
        raise RecipeError(f"--time: {error}") from error
    container = dict(said["container"]) if isinstance(said["container"], dict) else None
    if isinstance(said["container"], str):
        container = {**(site.container.model_dump() if site.container else {}), "image": said["container"]}
    check_name(folder, in_container=container is not None, local=local)
    names = ("gpus_per_node", "memory_per_node", "partition", "account", "qos", "constraint", "exclude")
    names += ("preflight", "signal_seconds", "max_requeues", "max_crashes", "environment", "sbatch")
    names += ("cpus_per_rank",)
    return Submission(
        run=str(folder),
        name=recipe.name,
        nodes=1 if local else said["nodes"],  # the site's are those of jobs
        ranks_per_node=said["ranks_per_node"] or said["gpus_per_node"] or 1,
        minutes=limit,
        container=container,
        setup=tuple(site.setup),
        srun=tuple(site.srun),
        local=local,
        **{name: said[name] for name in names},
    )


def check_name(folder: Path, *, in_container: bool, local: bool = False) -> None:
    """Make sure that Slurm's commands, and Python on any machine, can be given this folder.

    Errors:
        RecipeError: it has a character that means something else there, and that cannot be quoted everywhere.
    """
    reasons = {":": "separates folders in PYTHONPATH"}
    if not local:
        reasons["%"] = "begins a pattern in the names of Slurm's output files"
        reasons |= dict.fromkeys("\"'\\", "is a quotation mark in batch scripts")
    if in_container and not local:
        reasons[","] = "separates the mounts of a container"
    for character in str(folder):
        why = reasons.get(character, "" if character.isprintable() else "cannot be printed")
        if why:
            raise RecipeError(
                f"the run folder {str(folder)!r} cannot be used: {character!r} {why}. "
                "Choose another --run folder"
            )


def submit_prepared(submission: Submission) -> Submission:
    """Call sbatch for a run whose folder is ready; returns the submission with its job.

    Errors:
        SchedulerError: Slurm refuses.
    """
    from launch.supervisor import supervise_job

    executor = executor_of(submission)
    with slurm_errors():
        job = executor.submit(supervise_job, submission.run)
    submission = replace(submission, job_id=str(job.job_id), submitted=time.time())
    write_submission(submission)
    return submission


@contextmanager
def slurm_errors() -> Iterator[None]:
    """Turn what submitit raises into a `SchedulerError` with sbatch's own words."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = [line for line in lines if "sbatch" in line or "rror" in line] or lines
        raise SchedulerError(f"Slurm refuses the job: {'; '.join(said[-3:])[:800]}") from error


def batch_script(submission: Submission) -> str:
    """The exact script that `submit_prepared` gives to sbatch."""
    executor = executor_of(submission)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def executor_of(submission: Submission) -> Any:
    """Submitit's executor with everything that Slurm is asked for.

    Errors:
        RecipeError: see `check_name`.
        SlurmMissing: there is no Slurm.
    """
    from submitit import SlurmExecutor

    run = Path(submission.run)
    check_name(run, in_container=submission.container is not None)
    try:
        executor = SlurmExecutor(folder=launch_folder(run) / "slurm")
    except RuntimeError as error:
        raise slurm.SlurmMissing(
            "there is no Slurm on this machine: submit from a login node, or use `--local` to train here"
        ) from error
    wanted = {
        "job_name": submission.name,
        "nodes": submission.nodes,
        "ntasks_per_node": submission.ranks_per_node,
        "gpus_per_node": submission.gpus_per_node or None,
        "cpus_per_task": submission.cpus_per_rank,
        "mem": submission.memory_per_node,
        "partition": submission.partition,
        "account": submission.account,
        "qos": submission.qos,
        "constraint": submission.constraint,
        "exclude": ",".join(filter(None, [submission.exclude, *avoided_nodes(run)])) or None,
    }
    more = {"requeue": True, "chdir": str(run / "code"), "output": f"{run}/logs/slurm-%j.log"}
    executor.update_parameters(
        time=submission.minutes,
        signal_delay_s=submission.signal_seconds,
        wckey=None,  # submitit's own is refused where workload keys are checked
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={**more, **submission.sbatch},
        setup=[
            "# Slurm's signals reach this shell too; the supervisor below still has to write down why",
            "trap : TERM USR2",
            f"export PYTHONPATH={shlex.quote(str(run / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}",
            *submission.setup,
        ],
        **{name: value for name, value in wanted.items() if value is not None},
    )
    return executor


def resubmit(run: Path, changes: Wishes, *, new_code: bool = False) -> Submission:
    """Submit a run again, on other nodes or with other limits; a job of it that waits is cancelled first.

    Errors:
        TubeworksError: it was never submitted, its job is running, or it is finished.
        SchedulerError: Slurm refuses.
    """
    from framework.recipe import load_recipe

    before = read_submission(run)
    recipe = load_recipe(str(launch_folder(run) / "recipe.yaml")).recipe
    if newest_step(run) >= recipe.train.steps:
        raise TubeworksError(f"{run} is finished: its checkpoint of step {recipe.train.steps} is there")
    said = changes.given()
    if "time" in said:
        try:
            said["minutes"] = minutes(said.pop("time"))
        except ValueError as error:
            raise RecipeError(f"--time: {error}") from error
    if "container" in said:
        said["container"] = {**(before.container or {}), "image": said["container"]}
    if "gpus_per_node" in said and "ranks_per_node" not in said:
        said["ranks_per_node"] = said["gpus_per_node"] or before.ranks_per_node
    submission = replace(before, **said, local=False)
    check_recipe(fitted(recipe, run, submission.ranks), submission)
    job = active_job(run)
    if job is not None and job.state != "PENDING":
        raise TubeworksError(
            f"job {job.job_id} works on {run} ({job.state.lower()}): wait for it, or end it with "
            f"`tubeworks launch cancel {run}`"
        )
    if job is not None:
        slurm.cancel(str(before.job_id))  # of an array that waits, this element alone
    if new_code:
        submission = replace(submission, git=take_snapshot(Path(submission.run) / "code"))
    return submit_prepared(submission)


def active_job(run: Path) -> slurm.Job | None:
    """The job that works on a run or waits to; None without one, or where nobody knows of it any more."""
    try:
        submission = read_submission(run)
    except TubeworksError:
        return None
    if submission.job_id is None:
        return None
    try:
        job = slurm.show_job(submission.job_id)
    except (slurm.UnknownJob, slurm.SlurmMissing):
        return None
    # a new cluster, or one whose counter began again, gives the same numbers to other jobs
    return job if not job.has_ended and works_on(job, submission.run) else None


def works_on(job: slurm.Job | slurm.PastJob, run: str) -> bool:
    """Whether a job is that of a run; the elements of a sweep share their code."""
    return os.path.realpath(job.work_dir) == os.path.realpath(f"{run}/code")


def refuse_if_active(folder: Path) -> None:
    """Make sure that no job works on the run folder.

    Errors:
        TubeworksError: one does.
    """
    job = active_job(folder)
    if job is not None:
        raise TubeworksError(
            f"job {job.job_id} ({job.state.lower()}) works on {folder}: wait for it, cancel it with "
            f"`tubeworks launch cancel {folder}`, or choose another --run folder"
        )


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Make sure that nothing else lies in the folder, and a run there is of the same experiment.

    Errors:
        RecipeError: it is not; the files, or what differs, are listed.
    """
    from framework.training.run_folder import check_continuation
    from framework.training.run_place import check_place

    check_place(folder)
    if not (folder / "recipe.yaml").exists():
        return
    check_continuation(folder, recipe, None)


def register(folder: Path, recipe: Recipe, git: dict[str, str]) -> str | None:
    """Make the MLflow run, or leave that to the training where no server answers."""
    if not recipe.tracking.mlflow:
        return None
    from framework.recipe import recipe_hash
    from framework.tracking.mirror import RunInfo
    from framework.tracking.registration import register_run

    info = RunInfo(recipe_hash=recipe_hash(recipe), git=git, host="", supervised=True)
    return register_run(folder, recipe, info)
