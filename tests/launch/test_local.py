"""Ranks as processes: exit codes, whose fault it was, signals, and nobody left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.errors import CheckpointError, RecipeError, TubeworksError
from framework.world import World
from launch import local


def run_program(tmp_path: Path, program: str, ranks: int = 2) -> subprocess.Popen[str]:
    """`run_ranks` in a process of its own, with ranks that run `program` (after `import os, sys, time …`)."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(program)
    )
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from launch import local
            local.GRACE_SECONDS, local.TOGETHER_SECONDS = 5.0, 10.0
            local.rank_command = lambda arguments: [sys.executable, *arguments]
            sys.exit(local.run_ranks([{str(script)!r}], {ranks}, Path({str(tmp_path / "logs")!r})))
            """
        )
    )
    return subprocess.Popen(
        [sys.executable, str(launcher)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(local.__file__).parent.parent)},
    )


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, float]:
    """Exit code, what was said on stderr, and how long it took."""
    began = time.monotonic()
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said, time.monotonic() - began


def test_all_well(tmp_path: Path) -> None:
    code, said, _ = finish(run_program(tmp_path, "print('rank', rank, 'of', os.environ['WORLD_SIZE'])", 3))
    assert (code, said) == (0, "")
    assert (tmp_path / "logs" / "rank-2.log").read_text() == "rank 2 of 3\n"
    assert not (tmp_path / "logs" / "rank-0.log").exists(), "rank 0 speaks on the terminal"


def test_the_failing_ranks_code_and_last_words(tmp_path: Path) -> None:
    program = "if rank == 1: print('this is why'); sys.exit(3)\nsys.exit(6)"
    code, said, _ = finish(run_program(tmp_path, program))
    assert code == 3, "code 6 only means that the other one was lost"
    assert "rank 1 left with exit code 3" in said
    assert "rank-1.log:\n  this is why\n" in said


def test_a_killed_rank_is_named_and_others_that_hang_are_killed(tmp_path: Path) -> None:
    program = "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    code, said, seconds = finish(run_program(tmp_path, program, 3))
    assert code == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL: did the machine run out of memory?" in said
    assert "ranks that did not leave by themselves and were killed: 0, 2" in said
    assert seconds < 30


def test_what_all_decide_together_gets_more_time(tmp_path: Path) -> None:
    program = "if rank == 1: sys.exit(4)\ntime.sleep(2.5); print('tidied up', file=sys.stderr); sys.exit(4)"
    code, said, _ = finish(run_program(tmp_path, program))
    assert code == 4
    assert said == "tidied up\n", "rank 0 has said all that there is to say"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_go_to_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    program = """
        def leave(number, frame):
            open(f'got-{rank}', 'w').write(str(number))
            sys.exit(128 + number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, leave)
        open(f'ready-{rank}', 'w').close()
        time.sleep(60)
    """
    program = f"os.chdir({str(tmp_path)!r})\n" + textwrap.dedent(program)
    process = run_program(tmp_path, program)
    wait_until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    process.send_signal(number)
    code, said, _ = finish(process)
    assert code == 128 + number
    assert [(tmp_path / f"got-{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2
    assert said == ""


def test_ranks_outlive_no_launcher(tmp_path: Path) -> None:
    program = f"""
        os.chdir({str(tmp_path)!r})
        def leave(number, frame):
            open(f'left-{{rank}}', 'w').close()
            sys.exit()
        signal.signal(signal.SIGTERM, leave)
        open(f'ready-{{rank}}', 'w').close()
        time.sleep(60)
    """
    process = run_program(tmp_path, program)
    wait_until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    process.kill()
    process.communicate()
    wait_until(lambda: all((tmp_path / f"left-{rank}").exists() for rank in (0, 1)))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ([0, 0], None),
        ([0, 3], 1),
        ([3, 3], 0),
        ([6, 1], 1),
        ([6, -9], 1),
        ([1, -9], 1),
        ([6, 6], 0),
        ([None, 2], 1),
        ([143, 143], 0),
    ],
)
def test_whose_fault(codes: list[int | None], rank: int | None) -> None:
    assert local.rank_at_fault(codes) == rank


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def test_free_port(listener: int) -> None:
    ports = {local.free_port() for _ in range(20)}
    assert listener not in ports
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports.pop()))


def test_the_environment_of_a_rank() -> None:
    env = local.rank_environment(World(1, 2, 1, 2), 1234, {"HOME": "here", "RANK": "7"})
    assert World.from_env(env) == World(1, 2, 1, 2)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["HOME"]) == ("127.0.0.1", "1234", "here")
    assert env["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
    assert local.rank_environment(World(), 1, {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


def test_logs_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="Remove what is in its place, or choose another --run folder"):
        local.run_ranks(["train"], 2, tmp_path / "run" / "logs")


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("2", 1), ("0,3", 2), ("MIG-a/1/0,MIG-b/2/0", 2)]
)
def test_only_gpus_that_may_be_used_count(monkeypatch: pytest.MonkeyPatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local._gpus() == count


def test_more_ranks_than_gpus_are_refused() -> None:
    local.check_gpus(2, 0)
    local.check_gpus(2, 2)
    with pytest.raises(TubeworksError, match="2 ranks, and 1 GPU"):
        local.check_gpus(2, 1)


def test_ranks_that_cannot_share_the_batch_are_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RecipeError, match="not divisible by 9999: motion: 32, digits: 96"):
        local.train_command("demo", [], 9999, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ranks_that_refuse_to_begin_leave_nothing_behind(tmp_path: Path) -> None:
    code, _, _ = finish(run_program(tmp_path, "print('no', file=sys.stderr); sys.exit(3)"))
    assert code == 3
    assert not (tmp_path / "logs").exists()


def test_the_logs_of_a_crash_stay(tmp_path: Path) -> None:
    code, _, _ = finish(run_program(tmp_path, "print('oh', file=sys.stderr); sys.exit(rank)"))
    assert code == 1
    assert "oh" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_a_hang_has_its_code_whoever_had_to_be_killed(tmp_path: Path) -> None:
    program = "os.kill(os.getpid(), signal.SIGKILL) if rank else sys.exit(7)"
    code, said, _ = finish(run_program(tmp_path, program))
    assert code == 7
    assert "rank 1 was ended by SIGKILL" in said
