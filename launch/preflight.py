"""The pre-flight of a job, as its supervisor sees it: have nodes checked, judge them, avoid the bad ones."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from framework.errors import SchedulerError
from framework.files import replace_text
from launch import slurm
from launch.bad_nodes import add_bad_nodes, avoided_nodes
from launch.partitions import choose_partition, partitions
from launch.preflight_node import Settings, reports_folder
from launch.submission import Submission, attempts_of

__all__ = ["BAD_NODE", "NOT_READY", "judge", "patience", "prepare", "record", "verdict"]

log = logging.getLogger(__name__)

BAD_NODE = 86
"""Exit code of an attempt that ended in its pre-flight: a node is avoided from now on."""
NOT_READY = 87
"""The same where no node can be blamed, or none is left to take its place."""


def prepare(run: Path, submission: Submission, nodes: Sequence[str], env: Mapping[str, str]) -> bool:
    """Write down what the nodes have to check; False where nothing has to be checked.

    Nodes that have passed not long ago are not checked again, unless the last attempt crashed on them.
    """
    wanted = dict(submission.preflight)
    if not wanted.pop("enabled", False):
        return False
    valid, _ = wanted.pop("valid_minutes"), wanted.pop("exclude_hours")
    history = [one.cause for one in attempts_of(run) if one.cause is not None]
    calm = bool(history) and history[-1] in ("preempted", "time limit", "signal", "bad node", "stopped")
    passed = _passed(run)
    if calm and all(time.time() - passed.get(node, 0.0) < valid * 60 for node in nodes):
        log.info("pre-flight: %s passed it a while ago", ", ".join(nodes))
        return False
    settings = Settings(gpus=submission.gpus_per_node, nodes=submission.nodes, shards=_shards(run), **wanted)
    reports_folder(run, env).mkdir(parents=True, exist_ok=True)
    path = run / "launch" / "preflight" / "settings.json"
    replace_text(path, json.dumps(asdict(settings)) + "\n")
    return True


def patience(submission: Submission) -> float:
    """Seconds until the whole pre-flight counts as hanging."""
    return 4 * float(submission.preflight["seconds"])


def judge(run: Path, nodes: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with which node, from the reports; a node without one, or with half of one, hangs."""
    reasons: dict[str, str] = {}
    reports = {node: _report(reports_folder(run, env) / f"{node}.json") for node in nodes}
    for node, report in reports.items():
        if report is None:
            reasons[node] = "it left no report: it does not see the run folder, or started no process"
            continue
        problems = [check["problem"] for check in report["checks"] if check["problem"]]
        if problems:
            reasons[node] = "; ".join(problems)
        elif report["at"] not in ("ready", "together", "done"):
            reasons[node] = f"it hung at `{report['at']}`"
    return reasons


def record(
    run: Path, submission: Submission, nodes: Sequence[str], reasons: Mapping[str, str], code: int
) -> int:
    """Keep what came out of a step that left with `code`; returns 0, `BAD_NODE`, or `NOT_READY`."""
    if code and not reasons:
        return _not_ready(run, f"the nodes did not come to an end together (exit code {code})")
    now = time.time()
    passed = {**_passed(run), **{node: now for node in nodes if node not in reasons}}
    passed = {node: when for node, when in passed.items() if node not in reasons}
    replace_text(run / "launch" / "preflight" / "passed.json", json.dumps(passed) + "\n")
    if not reasons:
        log.info("pre-flight: %s can be used", ", ".join(nodes))
        return 0
    said = "; ".join(f"{node}: {reason}" for node, reason in reasons.items())
    if len(reasons) == len(nodes) > 1:
        return _not_ready(run, f"all nodes fail, which is hardly their fault: {said}")
    if set(reasons) <= set(avoided_nodes(run)):
        return _not_ready(run, f"Slurm gives the job nodes that it should avoid: {said}")
    if not _are_left(run, submission, reasons):
        return _not_ready(run, f"the partition has too few other nodes: {said}")
    _say(run, said)
    hours = float(submission.preflight["exclude_hours"])
    add_bad_nodes(run, reasons, hours, slurm.own_job_id() or "")
    return BAD_NODE


def verdict(run: Path) -> str:
    """What the last pre-flight that failed has said."""
    with suppress(OSError):
        return (run / "launch" / "preflight" / "verdict.txt").read_text(encoding="utf-8").strip()
    return ""


def _not_ready(run: Path, text: str) -> int:
    _say(run, text)
    return NOT_READY


def _say(run: Path, text: str) -> None:
    log.warning("pre-flight: %s", text)
    replace_text(run / "launch" / "preflight" / "verdict.txt", text[:2000] + "\n")


def _are_left(run: Path, submission: Submission, reasons: Mapping[str, str]) -> bool:
    """Whether the partition has enough nodes without those that are avoided; True where that is not known."""
    try:
        partition = choose_partition(submission.partition, partitions())
        every = set(slurm.expand_nodes(partition.nodes)) if partition.nodes else set()
        out = set(slurm.expand_nodes(submission.exclude)) if submission.exclude else set()
    except SchedulerError as error:
        log.warning("how many nodes are left is not known: %s", error)
        return True
    return not every or len(every - out - set(reasons) - set(avoided_nodes(run))) >= submission.nodes


def _shards(run: Path) -> list[str]:
    from framework.recipe import load_recipe

    recipe = load_recipe(str(run / "launch" / "recipe.yaml")).recipe
    return list(dict.fromkeys(recipe.data.sources[name].path for name in recipe.data.mixture))


def _passed(run: Path) -> dict[str, float]:
    return _report(run / "launch" / "preflight" / "passed.json") or {}


def _report(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
