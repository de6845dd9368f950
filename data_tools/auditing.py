"""`tubeworks data audit RUN`: what a run was fed, and whether every epoch was exactly once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from framework.data.audit import audit_ledger, check_order, read_history, with_keys
from framework.data.plan import Plan
from framework.data.quarantine import read_quarantine
from framework.data.sources import OpenSource, build_plan, open_sources
from framework.errors import TubeworksError
from framework.recipe import load_recipe
from framework.training.checkpoint_manifest import checkpoint_folders
from framework.wording import counted

__all__ = ["audit_run", "audit_text"]


def audit_run(run: Path) -> dict[str, Any]:
    """The audit of a run, ready for JSON; `problems` is empty if every epoch was exactly once.

    The ledger alone tells what was fed how often. Where the shards can be opened, every step is compared with
    the plan as well, and samples are named; `order` says whether that was possible.

    Errors:
        DataError: the run has no ledger, or it is damaged.
    """
    history = read_history(run)
    audit = audit_ledger(history)
    saved = [int(folder.name.removeprefix("step-")) for folder in checkpoint_folders(run)]
    if saved and max(saved) > audit.steps:
        audit.problems.append(
            f"there is a checkpoint of step {max(saved)}, but the ledger ends with step {audit.steps}"
        )
    keys: dict[str, Callable[[int], str]] = {}
    try:
        sources, plan = _plan_of(run)
    except TubeworksError as error:
        order = f"not checked: {error}"
    else:
        order = "checked"
        keys = {name: _key_of(opened) for name, opened in sources.items()}
        if history.plans and plan.hash != history.plans[-1]:
            order = "not checked: the shards are not those of the run"
        elif not history.segments:
            order = "not checked: the ledger has no steps"
        else:
            audit.problems += check_order(history, plan, read_quarantine(run))
    return {**with_keys(audit, keys), "order": order}


def _plan_of(run: Path) -> tuple[dict[str, OpenSource], Plan]:
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    sources = open_sources(recipe)
    return sources, build_plan(recipe, sources)


def _key_of(opened: OpenSource) -> Callable[[int], str]:
    return lambda index: str(opened.manifest.sample(int(opened.selection[index])).key)


def audit_text(content: dict[str, Any]) -> str:
    """The audit in words."""
    lines = [
        f"{counted(content['steps'], 'step')} in {counted(content['attempts'], 'attempt')}, "
        f"{counted(content['replayed_steps'], 'step')} thrown away and fed again"
    ]
    for name, source in content["sources"].items():
        lines += _source_lines(name, source)
    lines.append(f"order of the samples against the plan: {content['order']}")
    lines += [f"PROBLEM: {problem}" for problem in content["problems"]]
    if content["exactly_once"]:
        lines.append("every good sample exactly once in every epoch")
    return "\n".join(lines)


def _source_lines(name: str, source: dict[str, Any]) -> list[str]:
    epochs = source["epochs"]
    whole = sum(epoch["complete"] for epoch in epochs)
    fed = sum(epoch["fed"] for epoch in epochs)
    replaced = [sample for epoch in epochs for sample in epoch["replaced"]]
    lines = [
        f"{name}: {counted(source['samples'], 'sample')}, {counted(whole, 'whole epoch')}, "
        f"{fed} fed, {len(replaced)} replaced"
    ]
    if epochs and not epochs[-1]["complete"]:
        lines.append(f"  epoch {epochs[-1]['epoch']}: {epochs[-1]['places']} of {source['samples']} so far")
    for epoch in epochs:
        for what in ("missing", "doubled"):
            shown = ", ".join(str(sample.get("key", sample["index"])) for sample in epoch[what][:8])
            more = epoch[f"{what}_count"] - min(8, len(epoch[what]))
            if shown:
                lines.append(f"  epoch {epoch['epoch']}: {what} {shown}{f' and {more} more' if more else ''}")
    return lines
