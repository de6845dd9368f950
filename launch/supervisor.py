"""What the batch script of a job runs: start the ranks, see how they end, decide whether to start again.

One place decides, whatever stopped the ranks: a signal after which they saved, a rank that was killed, a
defect. On this machine (`--local`) the same loop starts the ranks as processes.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from framework.errors import SchedulerError
from framework.training.supervision import GOES_ON
from launch import preflight, slurm
from launch.bad_nodes import avoided_nodes
from launch.requeue import FINAL_CODES, Cause, Decision, cause_of_stop, decide, stopped_by_guard
from launch.submission import (
    Attempt,
    Submission,
    attempts_of,
    begin_attempt,
    end_attempt,
    launch_folder,
    read_stop,
    read_submission,
    write_stop,
)
from launch.supervised import VARIABLE

__all__ = ["Host", "SlurmHost", "supervise", "supervise_job"]

log = logging.getLogger(__name__)

NOT_FOR_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Leftovers of another launcher in the user's shell would be believed before srun."""


class Host(Protocol):
    """Where the ranks run: a Slurm job, or this machine."""

    job_id: str
    restart: int
    nodes: str

    def run_ranks(self) -> int:
        """Start the ranks and wait for them; the exit code."""
        ...

    def why(self) -> Cause | None:
        """Why the ranks were told to stop; None where nobody told them."""
        ...

    def start_again(self) -> bool:
        """Put the run back: True where this process goes on with it, False where another will."""
        ...

    def tell(self, text: str) -> None:
        """Say it where people look."""
        ...


def supervise_job(run: str) -> None:
    """Entry of the batch script (through submitit); leaves with the exit code of the ranks.

    Errors:
        TubeworksError: the run folder cannot be read or written.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    folder = Path(run)
    sys.exit(supervise(folder, SlurmHost(folder, read_submission(folder))))


def supervise(run: Path, host: Host) -> int:
    """Attempts at a run until it is finished, given up, or in another process's hands; the exit code."""
    submission = read_submission(run)
    while True:
        attempt = begin_attempt(run, host.job_id, host.restart, host.nodes)
        given_up = stopped_by_guard(attempts_of(run)[:-1], submission.max_crashes)
        if given_up is not None and attempt.job_id == _previous_job(run):
            end_attempt(run, attempt, "refused", None, given_up)
            return _give_up(
                run, host, Decision(False, f"stopped by the crash-loop guard: {given_up}", "FAILED"), 1
            )
        log.info("attempt %d on %s, from step %d", attempt.number, attempt.nodes, attempt.from_step)
        code = host.run_ranks()
        ended = end_attempt(run, attempt, *_cause(run, host, attempt, code))
        decision = decide(attempts_of(run), submission.max_requeues, submission.max_crashes)
        log.info(
            "attempt %d ended: %s, step %s, exit code %d", attempt.number, ended.cause, ended.to_step, code
        )
        if not decision.again:
            return _give_up(run, host, decision, code)
        log.info("starting again: %s", decision.reason)
        try:
            if not host.start_again():
                return code
        except SchedulerError as error:
            reason = f"{decision.reason}, but Slurm did not requeue the job: {error}"
            return _give_up(run, host, Decision(False, reason, "KILLED"), code)


class SlurmHost:
    """The job that this batch script belongs to."""

    def __init__(self, run: Path, submission: Submission) -> None:
        self.job_id = slurm.own_job_id() or "?"
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        self._run, self._submission = run, submission
        self._told_to_end = False
        # bash passes nothing on, but Slurm signals every process of the batch script
        signal.signal(signal.SIGTERM, self._ask_why)
        # that one is for the ranks; submitit's handler would requeue at once
        signal.signal(signal.SIGUSR2, lambda *_: None)

    def run_ranks(self) -> int:
        """Check the nodes, then start the ranks through srun and wait for them."""
        (self._run / "logs").mkdir(parents=True, exist_ok=True)
        return self._check_nodes() or self._run_step(step_command(self._run, self._submission))

    def _check_nodes(self) -> int:
        """The pre-flight: 0 where the ranks can start, else the exit code of the attempt."""
        try:
            nodes = slurm.expand_nodes(self.nodes)
        except SchedulerError as error:
            log.warning("no pre-flight, for the nodes' names are not known: %s", error)
            return 0
        if not preflight.prepare(self._run, self._submission, nodes, os.environ):
            return 0
        seconds = preflight.patience(self._submission)
        code = self._run_step(preflight_command(self._run, self._submission), seconds)
        if self.why() in ("preempted", "cancelled"):  # nothing is known of the nodes, and nothing is lost
            return GOES_ON
        reasons = preflight.judge(self._run, nodes, os.environ)
        return preflight.record(self._run, self._submission, nodes, reasons, code)

    def _run_step(self, command: Sequence[str], seconds: float | None = None) -> int:
        """Run a job step to its end, or for so long at most; its exit code."""
        log.info("%s", " ".join(command))
        process = subprocess.Popen(command, env=rank_environment(self._run, self._submission))
        asked, began = False, time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            if seconds is not None and time.monotonic() - began > seconds:
                process.kill()
            if self._told_to_end and not asked:
                asked = True
                self._keep_why()
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def why(self) -> Cause | None:
        """What the controller says; None where it does not say that the job has to stop."""
        try:
            job = slurm.show_job(self.job_id)
        except SchedulerError as error:
            log.warning("why the job stops is not known: %s", error)
            return None
        cause = cause_of_stop(job, self.restart, time.time(), self._submission.signal_seconds)
        return None if cause == "signal" else cause

    def start_again(self) -> bool:
        """Requeue the job: this process is ended by that, and Slurm starts the batch script again.

        Slurm takes a while to see that a node is gone, and would start the job on it once more.
        """
        avoided = sorted({*silent_nodes(self.nodes), *avoided_nodes(self._run)})
        if slurm.show_job(self.job_id).restarts == self.restart:  # else Slurm has done it itself
            slurm.requeue(self.job_id)
        if avoided:
            log.warning("the job will avoid %s", ", ".join(avoided))
            self._avoid(avoided)
        # leave when told to: the job waits for this process before it can start again
        deadline = time.monotonic() + 60
        while not self._told_to_end and time.monotonic() < deadline:
            time.sleep(0.1)
        return False

    def _avoid(self, nodes: Sequence[str], seconds: float = 5.0) -> None:
        """Exclude nodes from the waiting job; there is a moment before Slurm ends this process too."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return slurm.exclude_nodes(self.job_id, nodes)
            except SchedulerError as error:
                if time.monotonic() > deadline:
                    return log.warning("%s could not be excluded: %s", ", ".join(nodes), error)
                time.sleep(0.2)

    def tell(self, text: str) -> None:
        """Set the job's comment."""
        try:
            slurm.set_comment(self.job_id, f"tubeworks: {text}")
        except SchedulerError as error:
            log.warning("the job's comment could not be set: %s", error)

    def _ask_why(self, _number: int, _frame: object) -> None:
        self._told_to_end = True

    def _keep_why(self) -> None:
        """After SIGTERM there are seconds left: keep why, should nobody live to see the ranks end."""
        attempts, cause = attempts_of(self._run), self.why()
        if not attempts or cause is None:
            return
        log.info("told to end: %s", cause)
        if cause == "cancelled":
            end_attempt(self._run, attempts[-1], cause, None)
        elif not read_stop(self._run, attempts[-1].number)[0]:
            write_stop(self._run, attempts[-1].number, cause)


def step_command(run: Path, submission: Submission) -> list[str]:
    """The srun that starts all ranks, and ends all when one leaves with an error."""
    ends = ["--kill-on-bad-exit=1", "--wait=60", f"--output={run}/logs/rank-%t.log"]
    recipe = str(launch_folder(run) / "recipe.yaml")
    program = ["launch.task", "train", recipe, "--run", str(run)]
    return _srun(run, submission, submission.ranks_per_node, ends, program)


def preflight_command(run: Path, submission: Submission) -> list[str]:
    """The srun that checks every node; what one finds does not end the others."""
    ends = ["--kill-on-bad-exit=0", "--wait=0", f"--output={run}/logs/preflight-%N.log"]
    return _srun(run, submission, 1, ends, ["launch.preflight_node", str(run)])


def _srun(
    run: Path, submission: Submission, tasks: int, options: Sequence[str], program: Sequence[str]
) -> list[str]:
    """The srun that starts so many tasks of a Python module on every node."""
    command = [
        shutil.which("srun") or "srun",  # the site may give the ranks another PATH
        f"--nodes={submission.nodes}",
        f"--ntasks={submission.nodes * tasks}",
        f"--ntasks-per-node={tasks}",
        "--distribution=block",
        "--open-mode=append",
        f"--chdir={run}/code",
        *options,
    ]
    if submission.cpus_per_rank:
        command.append(f"--cpus-per-task={submission.cpus_per_rank}")
    python = sys.executable
    if submission.container:
        # beside the run folder lie MLflow's default store and the code of a sweep
        place = run.parent if run.parent != Path(run.anchor) else run
        mounts = [f"{place}:{place}", *submission.container.get("mounts", [])]
        command += [
            f"--container-image={submission.container['image']}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={run}/code",
        ]
        python = submission.container.get("python", "python3")
    return [*command, *submission.srun, python, "-u", "-m", *program]


def rank_environment(run: Path, submission: Submission) -> dict[str, str]:
    """The environment of the ranks: the submitter's, with the run's code first."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_RANKS}
    paths = [str(run / "code"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    environment[VARIABLE] = str(run)
    if submission.cpus_per_rank:
        environment.setdefault("OMP_NUM_THREADS", str(submission.cpus_per_rank))
    return {**environment, **submission.environment}


def silent_nodes(nodes: str, seconds: float = 3.0) -> list[str]:
    """Those of a job's nodes whose slurmd does not take a connection."""
    names: list[str] = []
    silent: list[str] = []
    try:
        names = slurm.expand_nodes(nodes) if nodes else []
        for name in names:
            facts = slurm.node_facts(name)
            try:
                address = (facts.get("NodeAddr", name), int(facts.get("Port", "6818")))
                socket.create_connection(address, timeout=seconds).close()
            except OSError:
                silent.append(name)
    except SchedulerError as error:
        log.warning("which nodes answer is not known: %s", error)
    return silent if len(silent) < len(names) else []  # rather the network of this node


def _cause(run: Path, host: Host, attempt: Attempt, code: int) -> tuple[str, int, str]:
    """Cause, exit code and a note of an attempt whose ranks have left."""
    if code == 0:
        return "finished", code, ""
    if attempts_of(run)[-1].cause == "cancelled":
        return "cancelled", code, ""
    if code in (preflight.BAD_NODE, preflight.NOT_READY):
        cause = "bad node" if code == preflight.BAD_NODE else "crashed"
        return cause, code, f"pre-flight: {preflight.verdict(run)}"
    stopped, cause = read_stop(run, attempt.number)
    cause = cause or host.why()
    if code == GOES_ON or (stopped and cause is not None):
        return cause or "signal", code, ""
    if cause in ("cancelled", "preempted"):
        return cause, code, ""
    note = last_words(run, attempt.began)
    if code in FINAL_CODES:
        return "refused", code, note
    return "crashed", code, f"exit code {code}" + (f": {note}" if note else "")


def last_words(run: Path, since: float) -> str:
    """The last error that a rank wrote in this attempt: its message, or the end of a traceback."""
    for log_file in sorted((run / "logs").glob("rank-*.log"), key=lambda path: (len(path.name), path.name)):
        try:
            if log_file.stat().st_mtime < since:
                continue
            lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
        except OSError:
            continue
        for number in range(len(lines) - 1, -1, -1):
            if lines[number].startswith("error: "):
                return lines[number].removeprefix("error: ")[:400]
            if lines[number].startswith("Traceback "):
                return _end_of_traceback(lines[number + 1 :])[:400]
    return ""


def _end_of_traceback(lines: Sequence[str]) -> str:
    return next((line for line in lines if line and not line.startswith(" ")), "")


def _previous_job(run: Path) -> str | None:
    attempts = attempts_of(run)
    return attempts[-2].job_id if len(attempts) > 1 else None


def _give_up(run: Path, host: Host, decision: Decision, code: int) -> int:
    """The run ends here: say why, and let MLflow know unless rank 0 has done that."""
    if decision.reason != "finished":
        log.warning("%s", decision.reason)
        host.tell(decision.reason)
        from framework.tracking.registration import settle_run

        settle_run(run, decision.status)
    return code
