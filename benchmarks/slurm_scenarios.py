"""What happens to runs on a real Slurm, with the times seen: `python -m benchmarks.slurm_scenarios`.

Runs the scenarios of `tests/slurm` (three hosts on this machine; root and Debian's slurm-wlm are needed) and
writes `benchmarks/results/slurm_scenarios.json`: the machine, and one entry per scenario.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "slurm_scenarios.json"


def slurm_version() -> str:
    """What `slurmctld -V` says; it needs no cluster."""
    done = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> int:
    """Run the scenarios and write what they took; the exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="pytest's -k")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pytest", "-q", "tests/slurm/test_scenarios.py"]
        command += ["-k", options.only] if options.only else []
        began, load = time.time(), os.getloadavg()[0]
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "TUBEWORKS_SLURM_RESULTS": str(found)}, check=False
        ).returncode
        scenarios = json.loads(found.read_text()) if found.exists() else []
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load when it began": round(load, 1),
            "slurm": slurm_version(),
        },
        "all scenarios passed": code == 0,
        "seconds": round(time.time() - began),
        "requeue delay (cred_expire), s": 5,
        "scenarios": scenarios,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(scenarios)} scenarios in {options.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
