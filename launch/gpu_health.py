"""Whether the GPUs of a node can be used, by what nvidia-smi and the kernel's log say."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence

__all__ = ["check_gpus", "gpu_problems", "xid_problems"]

FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
"""What nvidia-smi is asked for; of `remapped_rows.*` drivers before 460 know nothing."""
IDLE_MIB = 2048
"""A context of another process takes some hundred MiB, the driver itself less."""
SERIOUS_XIDS = frozenset({48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140})
"""Errors of the hardware by NVIDIA's list of Xids; others can be a program's own fault."""
XID_HOURS = 24.0


def check_gpus(wanted: int, env: Mapping[str, str], seconds: float = 60.0) -> tuple[list[str], str]:
    """Problems of this node's GPUs, none if they can be used, and what was seen in words.

    Device files alone are no GPUs: nvidia-smi must answer for each.
    """
    program = shutil.which("nvidia-smi", path=env.get("PATH"))
    if program is None:
        return [f"{wanted} GPUs are asked for, and there is no nvidia-smi: no driver is installed"], ""
    query = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        table = _ask(query, seconds)
        busy = _ask([program, "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader"], seconds)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi does not answer: {_words(error)}"], ""
    problems, seen = gpu_problems(table, busy, wanted, env.get("CUDA_VISIBLE_DEVICES"))
    try:
        kernel = _ask(["dmesg"], seconds)
    except (OSError, subprocess.SubprocessError):
        return problems, f"{seen}; Xid errors unknown: the kernel's log is not for this user"
    return [*problems, *xid_problems(kernel, time.clock_gettime(time.CLOCK_BOOTTIME))], seen


def gpu_problems(table: str, busy: str, wanted: int, visible: str | None) -> tuple[list[str], str]:
    """What nvidia-smi's tables say against the GPUs that are visible, and a summary."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    rows = [row for row in rows if len(row) == len(FIELDS)]
    if visible:  # without containment nvidia-smi shows those of other jobs too
        names = [name.strip() for name in visible.split(",")]
        chosen = [row for row in rows if row[0] in names or any(row[1].startswith(name) for name in names)]
        rows = chosen or rows
    problems = []
    if len(rows) < wanted:
        problems.append(f"{wanted} GPUs are asked for, nvidia-smi sees {len(rows)}")
    used = {
        line.split(",")[0].strip(): line.split(",")[-1].strip() for line in busy.splitlines() if line.strip()
    }
    for index, uuid, _, memory, errors, pending, failure in rows:
        if uuid in used:
            problems.append(f"GPU {index} is busy: process {used[uuid]} computes on it")
        elif memory.isdigit() and int(memory) > IDLE_MIB:
            problems.append(f"GPU {index} is not idle: {memory} MiB are taken")
        if errors.isdigit() and int(errors) > 0:
            problems.append(f"GPU {index} has {errors} uncorrected ECC errors")
        if failure == "Yes":
            problems.append(f"GPU {index} could not remap a bad row of memory: it has to be replaced")
        elif pending == "Yes":
            problems.append(f"GPU {index} waits for a reset to remap a bad row of memory")
    names = sorted({row[2] for row in rows})
    return problems, f"{len(rows)} x {', '.join(names)}" if rows else "none"


def xid_problems(kernel: str, boot_seconds: float) -> list[str]:
    """Serious Xids of the last day in the kernel's log, whose times count from the boot."""
    found: dict[str, str] = {}
    for stamp, device, number in re.findall(r"\[\s*(\d+)\.\d+\].*NVRM: Xid \(([^)]*)\): (\d+)", kernel):
        if int(number) in SERIOUS_XIDS and boot_seconds - int(stamp) < XID_HOURS * 3600:
            found[f"{device} {number}"] = f"Xid {number} at {device}"
    return list(found.values())


def _ask(command: Sequence[str], seconds: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    return done.stdout


def _words(error: Exception) -> str:
    said = getattr(error, "stderr", "") or getattr(error, "stdout", "") or ""
    return " ".join(str(said).split())[:200] or str(error)
