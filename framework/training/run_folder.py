"""The run folder: what was asked for, who worked on it, and whether a later start may go on with it.

RUN/recipe.yaml      the resolved recipe
RUN/run.json         version, hashes of recipe and plan, and one entry per attempt
RUN/journal.jsonl    the metrics (see framework.tracking.journal)
RUN/events.jsonl     what happened besides: replaced samples, skipped steps, checkpoints
RUN/quarantine.jsonl samples that are not fed again (see framework.data.quarantine)
RUN/ledger.bin       what was really fed (see framework.data.ledger)
RUN/checkpoints/     see framework.training.checkpoint
RUN/heartbeat/       where every rank is (see framework.watch.sentinel)
RUN/postmortem/      what happened when an attempt hung, died or failed
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from framework.data.plan import Plan
from framework.errors import CheckpointError, RecipeError, TubeworksError
from framework.recipe import dump_yaml, flatten, load_recipe, recipe_hash
from framework.recipe.paths import with_absolute_paths
from framework.recipe.schema import Recipe
from framework.tracking.lock import RunLock
from framework.tracking.sender import load_state
from framework.training.checkpoint_manifest import checkpoint_folders
from framework.training.distributed import Peers
from framework.training.run_place import check_place, missing_folders, remove_empty
from framework.training.signals import SignalFlag
from framework.training.storage import append_json, explain_os_error, write_json, write_text
from framework.watch.attempts import close_unknown, forget_heartbeats
from framework.world import World

__all__ = [
    "MAY_CHANGE",
    "append_event",
    "check_checkpoint",
    "check_continuation",
    "differences",
    "held_alone",
    "history_of",
    "open_run",
    "read_run",
    "take_alone",
]

log = logging.getLogger(__name__)

VERSION = 1

MAY_CHANGE = (
    "name",
    "description",
    "published",
    "init",
    "data.workers",
    "data.prefetch",
    "data.on_corrupt",
    "data.decode_seconds",
    "data.read_seconds",
    "data.max_corrupt",
    "data.cache",
    "data.sources.*.path",
    "data.sources.*.validation",
    "train.accumulation",
    "train.activation_checkpointing",
    "train.compile",
    "train.log_every",
    "train.eval_every",
    "engine.zero",
    "engine.offload",
    "engine.bucket_mb",
    "checkpoint",
    "guards",
    "evaluation",
    "tracking",
)
"""What may differ when a run goes on: it changes no batch and no loss (the plan's hash holds the shards)."""


def open_run(
    run: Path,
    recipe: Recipe,
    world: World,
    plan: Plan,
    start_step: int,
    accumulation: int,
    hosts: Sequence[str],
) -> int:
    """Write down that an attempt begins (rank 0 only); returns the attempt's number, from 0.

    `recipe` is the one that was asked for; `accumulation` is what is done on this number of ranks.

    Errors:
        CheckpointError: the folder cannot be written.
    """
    state = read_run(run) or {"version": VERSION, "name": recipe.name, "plan": plan.hash, "attempts": []}
    attempt = len(state["attempts"])
    changed = _changes(run, recipe, state["attempts"])
    for line in changed.values():
        log.info("changed since the last attempt: %s", line)
    asked = recipe.train.accumulation
    if accumulation != asked:
        text = (
            "train.accumulation is %d instead of %d on %d ranks: micro-batches stay no larger than they were"
        )
        log.info(text, accumulation, asked, world.size)
    state["sources"] = plan.described
    close_unknown(run, state)
    forget_heartbeats(run, attempt)
    state["recipe"] = recipe_hash(recipe)
    state["attempts"].append(
        {
            "attempt": attempt,
            "start_step": start_step,
            "ranks": world.size,
            "accumulation": accumulation,
            "asked_accumulation": asked,
            "changed": list(changed.values()),
            "folder": os.getcwd(),
            "host": platform.node(),
            "hosts": list(hosts),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )
    write_text(run / "recipe.yaml", dump_yaml(recipe))
    write_json(run / "run.json", state)
    for key in (key for key in changed if key.endswith(".validation")):
        # Metrics before and after are of different samples.
        append_event(run, "held_out_changed", start_step, change=changed[key])
    return attempt


def read_run(run: Path) -> dict[str, Any] | None:
    """What `run.json` says, or None for a folder without a run.

    Errors:
        TubeworksError: the file is damaged, or a later version wrote it.
    """
    path = run / "run.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        later = int(state["version"]) > VERSION
        whole = later or (
            isinstance(state["plan"], str) and all(isinstance(one, dict) for one in state["attempts"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (
            str(error) if isinstance(error, (OSError, ValueError)) else "it is not what was written there"
        )
        raise TubeworksError(
            f"cannot read {path}: {reason}. Restore it, or use a new --run folder"
        ) from error
    if later:
        raise TubeworksError(
            f"{path} has version {state['version']}, this tubeworks knows up to {VERSION}: upgrade it"
        )
    if not whole:
        raise TubeworksError(f"{path} is damaged. Restore it, or use a new --run folder")
    return state


@contextmanager
def held_alone(run: Path, peers: Peers, signals: SignalFlag) -> Iterator[None]:
    """Make the run folder, and keep other trainings out of it as long as this one lives.

    Errors:
        TubeworksError: another training works in the folder.
        RecipeError: the folder holds something else.
        CheckpointError: the folder cannot be made.
    """
    lock = RunLock(run, ".training.lock")
    missing = missing_folders(run)

    def let_go() -> None:
        if peers.world.is_main:
            leave_no_trace(run, lock, missing)
        lock.release()

    # From before the lock is taken: a signal may end this process as soon as there is something to take away.
    with signals.before_leaving(lambda _number: let_go()):
        try:
            peers.on_main(lambda: take_alone(run, lock))
            yield
        finally:
            let_go()


def leave_no_trace(run: Path, lock: RunLock, missing: Sequence[Path]) -> None:
    """If nothing began in the folder, take the lock file away, and the folder if it is empty then.

    So are the folders above it that were `missing` before.

    Whoever has opened the lock meanwhile sees that it is another file now, and opens it again.
    """
    if (run / "run.json").exists():
        return
    with contextlib.suppress(OSError):  # a folder that is not there, or that cannot be written
        if lock.acquire():  # else it is another training's
            lock.path.unlink(missing_ok=True)
    remove_empty([run, *missing[1:]])


def take_alone(run: Path, lock: RunLock) -> None:
    """Take the lock of a run folder; the system gives it back when its process ends, however that ends.

    Errors:
        TubeworksError: another process holds it.
        RecipeError: the folder holds something else.
        CheckpointError: the folder cannot be made or written.
    """
    check_place(run)
    with explain_os_error(run):
        run.mkdir(parents=True, exist_ok=True)
    with explain_os_error(lock.path):
        taken = lock.acquire()
    if not taken:
        attempts = (read_run(run) or {}).get("attempts") or [{}]
        last = {"host": "?", "started": "?", **attempts[-1]}
        since = "" if last.get("cause") else " (on {host} since {started})".format(**last)  # it only begins
        raise TubeworksError(
            f"another training works in {run}{since}: wait for it, stop it, or choose another --run folder"
        )


def check_continuation(run: Path, recipe: Recipe, plan: Plan | None) -> None:
    """Make sure that the recipe and its shards may go on with the run that lies in the folder.

    Without a plan only the recipe is compared.

    Errors:
        RecipeError: something that shapes the experiment differs; every difference is listed.
        TubeworksError: the folder's own files are damaged or gone.
    """
    if not (run / "recipe.yaml").exists():
        if (run / "run.json").exists() or checkpoint_folders(run):
            raise TubeworksError(
                f"{run} holds a run without its recipe.yaml: nobody can tell whether it was this recipe. "
                "Restore the file, or use a new --run folder"
            )
        return
    before = load_recipe(str(run / "recipe.yaml")).recipe
    _refuse_changes(str(run), before, recipe)
    state = read_run(run)
    if state and plan and state["plan"] != plan.hash:
        raise RecipeError(
            f"{run} was trained with plan {state['plan']}, this recipe and these shards make {plan.hash}: "
            f"the order of the samples would change{_other_sources(state.get('sources', {}), plan)}. "
            "Take the shards that it started with, or a new --run"
        )


def check_checkpoint(folder: Path, manifest: Mapping[str, Any], recipe: Recipe, plan: Plan) -> None:
    """Make sure that a checkpoint is of this experiment: somebody may have put it into the run folder.

    Errors:
        CheckpointError: it was trained on other shards or in another order.
        RecipeError: something that shapes the experiment differs; every difference is listed.
    """
    if manifest["plan"] != plan.hash:
        raise CheckpointError(f"{folder} is of a run with other shards or another order of samples")
    try:
        before = Recipe.model_validate(manifest.get("recipe_values"))
    except ValidationError:  # of a version with other keys: recipe.yaml has been compared
        return
    _refuse_changes(str(folder), before, recipe)


def history_of(run: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the run as a whole: its attempts, and the run in MLflow that mirrors it.

    Errors:
        TubeworksError: run.json is damaged.
    """
    return {"attempts": (read_run(run) or {}).get("attempts", []), "mlflow_run": load_state(run)["run_id"]}


def _refuse_changes(what: str, before: Recipe, recipe: Recipe) -> None:
    changed = [line for key, line in differences(before, recipe) if not _may_change(key)]
    if changed:
        listing = "\n  ".join(changed)
        raise RecipeError(
            f"{what} holds a run of another experiment:\n  {listing}\n"
            "Undo the change, or start a new run with --run NEW_FOLDER. "
            f"Only these may change between attempts: {', '.join(MAY_CHANGE)}"
        )


def _changes(run: Path, recipe: Recipe, attempts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What differs from the last attempt's recipe: dotted key and readable line.

    Paths are compared as their attempts meant them: `train` keeps them as they were written, `launch submit`
    makes them absolute. Without a record of the last attempt's working folder they are compared as written.
    """
    if not (run / "recipe.yaml").exists():
        return {}
    before = load_recipe(str(run / "recipe.yaml")).recipe
    folder = attempts[-1].get("folder") if attempts else None
    if folder is None:
        return dict(differences(before, recipe))
    return dict(
        differences(with_absolute_paths(before, Path(folder)), with_absolute_paths(recipe, Path.cwd()))
    )


def _other_sources(before: Mapping[str, Mapping[str, Any]], plan: Plan) -> str:
    """In which sources two plans differ, in words."""
    words = []
    for name in sorted({*before, *plan.described} if before else ()):
        old, new = before.get(name, {}), plan.described.get(name, {})
        words += [
            f"{name}: {key} {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}"
            for key in ("count", "samples", "shards", "identity")
            if old.get(key) != new.get(key)
        ]
    return f" ({'; '.join(words)})" if words else ""


def differences(before: Recipe, after: Recipe) -> list[tuple[str, str]]:
    """(dotted key, readable line) of every value that differs between two recipes."""
    old, new = flatten(before), flatten(after)
    absent = "(absent)"
    return [
        (key, f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}")
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def append_event(run: Path, kind: str, step: int, **facts: Any) -> None:
    """Add one line to `RUN/events.jsonl`.

    Errors:
        CheckpointError: the file cannot be written.
    """
    append_json(run / "events.jsonl", {"kind": kind, "step": step, "time": time.time(), **facts})


def _may_change(key: str) -> bool:
    parts = key.split(".")
    for pattern in MAY_CHANGE:
        wanted = pattern.split(".")
        if len(wanted) <= len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False)):
            return True
    return False
