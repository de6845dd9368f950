"""Make `.venv` and install the project into it: `python3 launch/bootstrap.py [extra …]`.

Runs before anything is installed, so it needs nothing but Python. torch comes first and pinned; where there
is no NVIDIA GPU it is the CPU build, of two hundred megabytes instead of several thousand. A stamp in `.venv`
makes a second call return at once while `setup.py` and `constraints.txt` are what they were.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MARKER = VENV / ".installed"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def say(text: str) -> None:
    """Tell the person at the terminal what happens."""
    sys.stdout.write(f"install: {text}\n")
    sys.stdout.flush()


def run(*command: str | Path) -> None:
    """Run a command and leave with its exit code if it fails."""
    code = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if code:
        say(f"failed: {' '.join(map(str, command))}")
        sys.exit(code)


def pinned_torch() -> str:
    """The version of torch in `constraints.txt`."""
    found = re.search(
        r"^torch==([0-9.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        sys.exit("install: constraints.txt does not pin torch")
    return found.group(1)


def installed_torch() -> str | None:
    """The version of torch in `.venv`, without its build (`+cpu`)."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    answer = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip().split("+")[0] or None


def answers(url: str, seconds: float = 5.0) -> bool:
    """Whether the address can be reached from here."""
    try:
        with urllib.request.urlopen(f"{url}/", timeout=seconds) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def torch_source() -> tuple[str, list[str]]:
    """Which build of torch is to be installed, in words, and the options of pip that get it."""
    if shutil.which("nvidia-smi"):
        return "for NVIDIA GPUs, several gigabytes", []
    if platform.system() != "Linux":
        return "the build of this system", []
    if answers(CPU_INDEX):
        return "CPU build", ["--index-url", CPU_INDEX]
    return f"{CPU_INDEX} does not answer, so from pip's own indexes", []


def stamp() -> str:
    """What the installation depends on, beside the extras, in one word."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for name in ("setup.py", "constraints.txt", "launch/bootstrap.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def installed_extras(wanted: str) -> set[str] | None:
    """The extras that were installed under the stamp `wanted`; None where that was not done."""
    if not MARKER.exists():
        return None
    found, *extras = MARKER.read_text(encoding="utf-8").split()
    return set(extras) if found == wanted else None


def make_venv() -> None:
    """Make `.venv`, or keep the one that is there."""
    if PYTHON.exists():
        return
    say(f"making .venv with Python {platform.python_version()}")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        sys.exit(
            "install: this Python cannot make virtual environments; on Debian: apt-get install python3-venv"
        )
    run(sys.executable, "-m", "venv", VENV)


def main(extras: list[str]) -> None:
    """Install torch, then the project with these extras, unless that is done already."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this runs before pip could refuse
        sys.exit(f"install: Python 3.10 or later is needed, this is {platform.python_version()}")
    wanted = stamp()
    there = installed_extras(wanted)
    if there is not None and there >= set(extras):
        return
    make_venv()
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    pip = (PYTHON, "-m", "pip", "install", "--quiet")
    version = pinned_torch()
    if installed_torch() != version:
        build, options = torch_source()
        say(f"torch {version} ({build}) …")
        run(*pip, *options, f"torch=={version}")
    extras = sorted({*extras, *(there or ())})
    target = f".[{','.join(extras)}]" if extras else "."
    say(f"tubeworks and what it needs ({target}); a few minutes the first time …")
    run(*pip, "--constraint", "constraints.txt", "--editable", target)
    MARKER.write_text(" ".join([wanted, *extras]), encoding="utf-8")
    say("done: .venv/bin/tubeworks")


if __name__ == "__main__":
    main(sys.argv[1:])
