"""`tubeworks launch doctor`: what the settings of a cluster mean for runs, and what to change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launch import slurm
from launch.partitions import Partition, partitions
from launch.site import Site

__all__ = ["Finding", "diagnose", "examine", "show_findings"]

Level = Literal["good", "note", "change"]
LONG_REQUEUE = 30


@dataclass(frozen=True)
class Finding:
    """A setting, its value, what it means for runs, and what would be better (empty: nothing)."""

    setting: str
    value: str
    level: Level
    meaning: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def diagnose(site: Site) -> list[Finding]:
    """Findings for the cluster of this machine.

    Errors:
        SchedulerError: see `launch.slurm.run`.
    """
    return examine(slurm.configuration(), partitions(), site)


def examine(settings: Mapping[str, str], known: Sequence[Partition], site: Site) -> list[Finding]:
    """Findings for what `scontrol show config` and the partitions say."""
    found = [_preemption(settings), *_user_signal(settings), _requeue(settings), _delay(settings)]
    found += [_kill_wait(settings, site), _forgotten(settings), _accounting(settings), *_silence(settings)]
    for one in known:
        found += _partition(one, settings, site)
    return found


def show_findings(findings: Sequence[Finding]) -> str:
    """For people: what has to change comes first."""
    marks = {"change": "CHANGE", "note": "note", "good": "good"}
    lines = []
    for one in sorted(findings, key=lambda finding: list(marks).index(finding.level)):
        lines.append(f"{marks[one.level]:<7} {one.setting} = {one.value}: {one.meaning}")
        if one.advice:
            lines.append(f"{'':<7} -> {one.advice}")
    return "\n".join(lines)


def _seconds(text: str) -> int | None:
    number = re.match(r"\d+", text)
    return int(number.group()) if number else None


def _preempts(settings: Mapping[str, str]) -> bool:
    return settings.get("PreemptType", "preempt/none") not in ("preempt/none", "(null)")


def _preemption(settings: Mapping[str, str]) -> Finding:
    value = settings.get("PreemptType", "preempt/none")
    if not _preempts(settings):
        return Finding("PreemptType", value, "good", "running jobs are never preempted")
    return Finding(
        "PreemptType", value, "note", f"jobs can be preempted; by default with {settings.get('PreemptMode')}"
    )


def _user_signal(settings: Mapping[str, str]) -> list[Finding]:
    if not _preempts(settings):
        return []
    value = settings.get("SlurmctldParameters", "")
    if "preempt_send_user_signal" in value:
        return [
            Finding("SlurmctldParameters", value, "good", "a preempted job hears SIGUSR2 first, then SIGTERM")
        ]
    return [
        Finding(
            "SlurmctldParameters",
            value or "(none)",
            "note",
            "a preempted job hears SIGTERM only. tubeworks saves on that too; programs that do not lose work",
            "SlurmctldParameters=preempt_send_user_signal",
        )
    ]


def _requeue(settings: Mapping[str, str]) -> Finding:
    value = settings.get("JobRequeue", "?")
    if value == "0":
        meaning = "jobs are not requeued unless they ask for it; tubeworks does (`--requeue`)"
        return Finding("JobRequeue", value, "note", meaning)
    return Finding("JobRequeue", value, "good", "a job whose node fails goes back into the queue")


def _delay(settings: Mapping[str, str]) -> Finding:
    value = settings.get("AuthInfo", "(null)")
    expire = re.search(r"cred_expire=(\d+)", value)
    seconds = int(expire.group(1)) if expire else 120
    where = f"cred_expire={seconds}" if expire else "cred_expire not set: 120"
    meaning = f"a requeued job waits {seconds} s before it can start again"
    if seconds <= LONG_REQUEUE:
        return Finding("AuthInfo", where, "good", meaning)
    return Finding(
        "AuthInfo", where, "note", meaning, "AuthInfo=cred_expire=15, where clocks agree that well"
    )


def _kill_wait(settings: Mapping[str, str], site: Site) -> Finding:
    value = settings.get("KillWait", "30 sec")
    seconds = _seconds(value) or 0
    meaning = f"after SIGTERM (scancel, end of the time limit) a job has {seconds} s until SIGKILL"
    if seconds < 30:
        advice = (
            f"KillWait=30 or more, so that a save fits; before the limit there are {site.signal_seconds} s"
        )
        return Finding("KillWait", value, "change", meaning, advice)
    return Finding("KillWait", value, "good", meaning)


def _forgotten(settings: Mapping[str, str]) -> Finding:
    value = settings.get("MinJobAge", "300 sec")
    meaning = (
        "so long the controller remembers a job that has ended; `launch status` asks sacct then, and where "
        "there is no accounting it reads the run folder"
    )
    return Finding("MinJobAge", value, "good", meaning)


def _accounting(settings: Mapping[str, str]) -> Finding:
    value = settings.get("AccountingStorageType", "accounting_storage/none")
    if value.endswith("/none") or value == "(null)":
        return Finding(
            "AccountingStorageType",
            value,
            "note",
            "sacct knows nothing; attempts are kept in RUN/launch/attempts.jsonl",
            "AccountingStorageType=accounting_storage/slurmdbd, for the history of all jobs",
        )
    return Finding("AccountingStorageType", value, "good", "sacct has the history of every attempt")


def _silence(settings: Mapping[str, str]) -> list[Finding]:
    value = settings.get("SlurmdTimeout", "300 sec")
    seconds = _seconds(value)
    if seconds is None:
        return []
    meaning = f"a node that is gone is noticed after {seconds} s; until then its job does not go on elsewhere"
    advice = "SlurmdTimeout=60 to 120" if seconds > 300 else ""
    return [Finding("SlurmdTimeout", value, "note" if advice else "good", meaning, advice)]


def _partition(one: Partition, settings: Mapping[str, str], site: Site) -> list[Finding]:
    name = f"partition {one.name}"
    found = []
    if one.state != "UP":
        found.append(Finding(f"{name}: State", one.state, "note", "it starts no jobs at the moment"))
    if not _preempts(settings) or one.preempt_mode == "OFF":
        return found
    if one.preempt_mode == "CANCEL":
        meaning = "a preempted job is cancelled: tubeworks saves if it has the time, and requeues itself"
        advice = f"PreemptMode=REQUEUE for {one.name}"
        found.append(Finding(f"{name}: PreemptMode", one.preempt_mode, "change", meaning, advice))
    elif one.preempt_mode == "REQUEUE":
        meaning = "a preempted job goes back into the queue"
        found.append(Finding(f"{name}: PreemptMode", one.preempt_mode, "good", meaning))
    value, wanted = f"{one.grace_seconds} s", min(site.signal_seconds, 120)
    meaning = f"a preempted job has {value} to save before SIGTERM"
    if one.preempt_mode in ("CANCEL", "REQUEUE") and one.grace_seconds < 30:
        advice = f"GraceTime={wanted} for {one.name}; `launch plan` says how long a save takes"
        found.append(Finding(f"{name}: GraceTime", value, "change", meaning, advice))
    else:
        found.append(Finding(f"{name}: GraceTime", value, "good", meaning))
    return found
