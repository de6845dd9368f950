"""The command line as people and scripts meet it: in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework import __version__

TUBEWORKS = [sys.executable, "-m", "launch.cli"]
HEAVY = (
    "torch",
    "deepspeed",
    "mlflow",
    "pydantic",
    "numpy",
    "av",
    "pyarrow",
    "kornia",
    "matplotlib",
    "ruamel",
)


def tubeworks(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run([*TUBEWORKS, *arguments], capture_output=True, text=True, timeout=60, cwd=folder)


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert tubeworks("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # time on a core, not on the clock: it is the same when others use this machine as well
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, launch.cli, data_tools.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(HEAVY) & {name.partition(".")[0] for name in loaded}


def test_help_names_every_command() -> None:
    text = tubeworks("--help").stdout
    for command in ("data", "recipe", "train", "eval", "describe", "sync", "ckpt"):
        assert command in text


@pytest.mark.parametrize(
    "command",
    ["data", "recipe", "recipe show", "recipe list", "train", "eval", "describe", "sync", "ckpt"],
)
def test_every_command_has_help(command: str) -> None:
    answer = tubeworks(*command.split(), "--help")
    assert answer.returncode == 0
    assert "Usage" in answer.stdout


def test_version() -> None:
    assert tubeworks("--version").stdout.strip() == f"tubeworks {__version__}"


def test_a_wrong_recipe_is_a_message_without_traceback(tmp_path: Path) -> None:
    answer = tubeworks("train", "demo", "train.stpes=5", "engine.zero=x", folder=tmp_path)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    first, *lines = answer.stderr.splitlines()
    assert first.startswith("error: recipe ")
    assert len(lines) == 2
    assert "train.stpes=5: unknown key, did you mean `steps`?" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_command_or_option_is_a_usage_error() -> None:
    for arguments in (["trian", "demo"], ["train", "demo", "--rank", "2"], ["train"]):
        answer = tubeworks(*arguments)
        assert answer.returncode == 2
        assert "Traceback" not in answer.stderr


def test_recipe_show_prints_origins_and_json() -> None:
    text = tubeworks("recipe", "show", "demo", "seed=7").stdout
    assert any(line.startswith("seed: 7") and line.endswith("# override") for line in text.splitlines())
    found = json.loads(tubeworks("recipe", "show", "demo", "seed=7", "--json").stdout)
    assert found["recipe"]["seed"] == 7
    assert found["provenance"]["seed"] == "override"


def test_recipe_list_names_what_is_installed() -> None:
    found = json.loads(tubeworks("recipe", "list", "--json").stdout)
    assert {"demo", "tubevit_b_k400_in1k", "tubevit_h_k400_in1k"} <= found.keys()
    assert all(found.values())


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen(
        [*TUBEWORKS, "recipe", "show", "tubevit_b_k400_in1k"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
        process.wait(timeout=60)
    assert complaint == b""


def wait_until_asleep(pid: int) -> None:
    """Wait until a process sleeps, as in a call that waits, each time of several that it is looked at."""
    asleep, deadline = 0, time.monotonic() + 60
    while asleep < 5:
        assert time.monotonic() < deadline
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.05)


def test_interrupting_ends_quietly_with_130(tmp_path: Path) -> None:
    pipe = tmp_path / "slow.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen([*TUBEWORKS, "recipe", "show", str(pipe)], stderr=subprocess.PIPE, text=True)
    # opening a pipe waits for its reader, who then waits for a text that does not come
    writer = os.open(pipe, os.O_WRONLY)
    wait_until_asleep(process.pid)  # a signal just before the call would be seen after it, which never ends
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in complaint
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*TUBEWORKS, "recipe", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: cannot write the output: No space left on device; make room there and start again"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["train"], ["ckpt", "list"], ["sync"], ["data", "inspect"]])
def test_paths_that_no_file_can_have(command: list[str]) -> None:
    done = tubeworks(*command, "n" * 300)
    assert done.returncode > 0
    assert "File name too long" in done.stderr
    assert "Traceback" not in done.stderr
