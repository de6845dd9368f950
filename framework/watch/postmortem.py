"""The post-mortem of an attempt: what happened, which rank is to blame, where every rank was.

RUN/postmortem/attempt-N.md is for people, attempt-N.json holds the same for programs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from framework.watch.attempts import close_attempt, newest_checkpoint
from framework.watch.page import PHASES
from framework.wording import counted

__all__ = ["blame", "compose", "newest_postmortem", "postmortem_path"]

Record = Mapping[str, Any]

LOST = "PeerLost"
ADVICE = {
    "TrainingStopped": "Going on unchanged ends the same way: change what the message advises; what alters "
    "the experiment needs a new --run (`init.weights={run}` takes the weights along).",
    "RecipeError": "Change the recipe as the message says; what alters the experiment needs a new --run.",
    "ModelError": "Change the recipe as the message says; what alters the experiment needs a new --run.",
    "DataError": "Mend the shards as the message says; then `tubeworks train {run}` goes on.",
    "CorruptSample": "Mend the shard or set data.on_corrupt=substitute; then `tubeworks train {run}`.",
}
"""What helps after an error of a class that comes again by itself."""

WAITS = ("torch/distributed/", "deepspeed/comm/")
"""Files whose functions wait for other ranks."""


def postmortem_path(run: Path, attempt: int) -> Path:
    """Where the post-mortem of an attempt lies."""
    return run / "postmortem" / f"attempt-{attempt}.md"


def newest_postmortem(run: Path, since: float = 0.0) -> Path | None:
    """The newest post-mortem of a run that was written after `since` (seconds since 1970)."""
    found = [(path.stat().st_mtime, path) for path in (run / "postmortem").glob("attempt-*.md")]
    return max((entry for entry in found if entry[0] >= since), default=(0.0, None))[1]


def compose(
    run: Path,
    attempt: int,
    size: int,
    records: Sequence[Record],
    samples_of: Callable[[Record], list[str]],
    *,
    rank_lives: bool,
) -> None:
    """Write the post-mortem, and how the attempt ended into `run.json`.

    With `rank_lives` the attempt still holds the run; without, another one may have begun meanwhile.
    """
    what = _what(records)
    accused = blame(records, size)
    guilty = [record for record in records if record["rank"] in accused]
    named = {record["rank"]: samples_of(record) for record in guilty[:4]}
    step = max((record["step"] for record in records), default=0)
    summary = {
        "attempt": attempt,
        "what": what,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "accused": {str(rank): reason for rank, reason in accused.items()},
        "samples": {str(rank): lines for rank, lines in named.items()},
        "checkpoint": newest_checkpoint(run),
        "advice": _advice(run, what, records),
        "replaced": _replaced(run),
        "ranks": list(records),
    }
    path = postmortem_path(run, attempt)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path.with_suffix(".json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _replace(path, _markdown(run, size, summary, records))
    close_attempt(run, attempt, cause=what, end_step=step, accused=accused, alone=not rank_lives)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _what(records: Sequence[Record]) -> str:
    states = {record["state"] for record in records}
    if "hung" in states:
        return "hang"
    if "died" in states:
        return "died"
    return f"failed: {_own_cause(records)}"


def _own_cause(records: Sequence[Record]) -> str:
    """The first line of the error that others only followed."""
    causes = [record["cause"].splitlines()[0] for record in records if record["cause"]]
    own = [cause for cause in causes if not cause.startswith(LOST)]
    return (own or causes or ["?"])[0]


def _advice(run: Path, what: str, records: Sequence[Record]) -> str:
    """What to do, which is not always to go on."""
    known = ADVICE.get(_own_cause(records).partition(":")[0]) if what.startswith("failed") else None
    return (known or "Going on: `tubeworks train {run}`.").replace("{run}", str(run))


def blame(records: Sequence[Record], size: int) -> dict[int, str]:
    """The ranks that are the reason, and why; of several kinds of evidence the strongest that there is.

    In a hang the others wait in a collective that these have not reached.
    """
    known = {record["rank"] for record in records}
    hung = any(record["state"] == "hung" for record in records)
    for evidence in (_dead, _hung if hung else _failed):
        found = evidence(records)
        if found:
            return found
    missing = sorted(set(range(size)) - known)
    return dict.fromkeys(missing, "nothing was heard of it")


def _dead(records: Sequence[Record]) -> dict[int, str]:
    return {
        record["rank"]: "its process ended without a word (killed, out of memory, or a crash below Python)"
        for record in records
        if record["state"] == "died"
    }


def _failed(records: Sequence[Record]) -> dict[int, str]:
    causes = {record["rank"]: record["cause"].splitlines()[0] for record in records if record["cause"]}
    own = {rank: cause for rank, cause in causes.items() if not cause.startswith(LOST)}
    return own or causes


def _hung(records: Sequence[Record]) -> dict[int, str]:
    silent = {
        record["rank"]: f"its node has not been heard of for {time.time() - record['written']:.0f} s"
        for record in records
        if record["state"] == "running"
    }
    stopped = {
        record["rank"]: f"its process is {record['process']}, so it reaches no collective"
        for record in records
        if record["process"][:1] in "TtZX"
    }
    if silent or stopped:
        return silent | stopped
    most = max(record["collectives"] for record in records)
    behind = {
        record["rank"]: f"has entered {record['collectives']} collectives, the others wait in number {most}"
        for record in records
        if record["collectives"] < most
    }
    if behind:
        return behind
    furthest = max(_place(record) for record in records)
    behind = {record["rank"]: "is behind the others" for record in records if _place(record) < furthest}
    if behind:
        return behind
    return {
        record["rank"]: f"is not in a collective, but at work in {record['phase']}"
        for record in records
        if not any(module in record["stacks"] for module in WAITS)
    }


def _place(record: Record) -> tuple[int, int, int]:
    return record["step"], record["micro"], PHASES.index(record["phase"])


def _replaced(run: Path) -> list[dict[str, Any]]:
    """The last samples that were replaced."""
    try:
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        if '"replaced"' in line:
            try:
                events.append(json.loads(line))
            except ValueError:  # torn by a crash
                continue
    return events[-20:]


def _markdown(run: Path, size: int, summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    accused, named = summary["accused"], summary["samples"]
    title = {"hang": "the job hung", "died": "a rank died"}.get(summary["what"], summary["what"])
    lines = [f"# Attempt {summary['attempt']} of {run.name}: {title}", ""]
    lines.append(f"Written {summary['written']}, at step {summary['step']}, {counted(size, 'rank')}.")
    lines.append(f"Newest checkpoint: {summary['checkpoint'] or 'none'}. {summary['advice']}")
    lines += ["", "## Who", ""]
    lines += [_accusation(rank, reason, records) for rank, reason in accused.items()]
    if not accused:
        lines.append(
            "Nobody stands out: all ranks are at the same place. Look at the network and the devices."
        )
    for rank, samples in named.items():
        lines += ["", f"Samples of rank {rank}:", "", *(f"- {line}" for line in samples or ["none"])]
    lines += ["", "## Where every rank was", "", *_table(records)]
    lines += ["", "## Slowest ranks", "", _slowest(records)]
    if summary["replaced"]:
        lines += ["", "## Samples that were replaced, last ones last", ""]
        lines += [
            f"- step {event['step']}: {event['source']} {event['key']} in {event['shard']}: {event['reason']}"
            for event in summary["replaced"]
        ]
    for record in records:
        rank = record["rank"]
        for name, text in (
            ("said", record["cause"]),
            ("log, last lines", "\n".join(record["log"][-20:])),
            ("stacks", record["stacks"]),
        ):
            if text:
                lines += ["", f"## Rank {rank}: {name}", "", "```", text.rstrip("\n"), "```"]
    return "\n".join(lines) + "\n"


def _accusation(rank: str, reason: str, records: Sequence[Record]) -> str:
    record = next((record for record in records if record["rank"] == int(rank)), None)
    if record is None:
        return f"**rank {rank}**: {reason}"
    return (
        f"**rank {rank}** on {record['host']} (process {record['pid']}), step {record['step'] + 1}, phase "
        f"{record['phase']}, micro-batch {record['micro']}: {reason}"
    )


def _table(records: Sequence[Record]) -> list[str]:
    lines = [
        "| rank | host | pid | state | process | step | phase | micro-batch | for s | Python answered s ago "
        "| collectives |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = ("rank", "host", "pid", "state", "process")
        rest = ("phase", "micro", "idle_s", "pulse_s", "collectives")
        row = [record[name] for name in cells] + [record["step"] + 1] + [record[name] for name in rest]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return lines


def _slowest(records: Sequence[Record]) -> str:
    """Ranks by the time that they waited for the others: who waits least is waited for."""
    order = sorted(records, key=lambda record: record["seconds"]["agree"])[:4]
    return "\n".join(
        f"- rank {record['rank']} on {record['host']}: waited {record['seconds']['agree']:.1f} s for the "
        f"others, {record['seconds']['data']:.1f} s for its data"
        for record in order
    )
