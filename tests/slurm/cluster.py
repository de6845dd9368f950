"""A real Slurm with three hosts on this machine: munged, slurmctld and three slurmd, private to a test run.

Each slurmd lives in namespaces of its own (hostname, /etc/hosts), so that jobs see three hosts whose names
resolve among each other; where the kernel refuses that, all share the machine's hostname. Every port, socket
and file is chosen anew and lies in one folder: several clusters can run side by side.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

NODES = ("c1", "c2", "c3")
NEEDED = ("slurmctld", "slurmd", "munged", "scontrol", "sbatch", "srun")

CONFIGURATION = """\
ClusterName=tubeworks
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits; two minutes by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}
# without it three small hosts on one machine count as broken
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=30
MinJobAge={job_age}
{accounting}
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
{gres}
{nodes}
PartitionName=low Nodes=c[1-3] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=c[1-3] MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing_reason() -> str | None:
    """Why there can be no Slurm here, after an attempt to install it; None where there can be one."""
    if os.geteuid() != 0:
        return "starting a Slurm needs root (munged and slurmd run as root)"
    return install(NEEDED, ("slurm-wlm", "munge"))


def install(commands: Sequence[str], packages: Sequence[str]) -> str | None:
    """Why these commands are not here, after an attempt to install their packages; None if they are."""
    if all(shutil.which(name) for name in commands):
        return None
    what = " and ".join(packages)
    if shutil.which("apt-get") is None:
        return f"{what} are not installed, and there is no apt-get"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["-y", "install", "--no-install-recommends", *packages]):
        words = ["apt-get", "-q", *command]
        subprocess.run(words, env=environment, capture_output=True, check=False, timeout=600)
    missing = [name for name in commands if shutil.which(name) is None]
    return f"{what} could not be installed: no {', '.join(missing)}" if missing else None


def namespaces_allowed() -> bool:
    """Whether a process may have a hostname and a mount table of its own here."""
    command = ["unshare", "-m", "-u", "true"]
    return shutil.which("unshare") is not None and _succeeds(command)


def wait_until(condition: object, seconds: float, what: str, every: float = 0.1) -> None:
    """Wait until a callable says yes; fails with `what` after so many seconds."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s: {what}"
        time.sleep(every)


class Cluster:
    """The daemons of one Slurm and the folder that they work in."""

    def __init__(self, *, user_signal: bool = True, namespaces: bool | None = None) -> None:
        # short, because a Unix socket's path has at most 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="tubeworks-slurm-"))
        self.folder.chmod(0o755)
        self.namespaces = namespaces_allowed() if namespaces is None else namespaces
        self.user_signal = user_signal
        self.configuration = self.folder / "slurm.conf"
        self.gpus = False
        self.accounting = "AccountingStorageType=accounting_storage/none"
        self.job_age = 3600
        """Seconds until the controller forgets a job that has ended."""
        first, *ports = _free_ports(3 + len(NODES))
        self._controller_port, self._node_ports = first, dict(zip(NODES, ports, strict=False))
        self.spare_ports = tuple(ports[len(NODES) :])

    @property
    def environment(self) -> dict[str, str]:
        """What a user of this cluster has in the environment."""
        return {"SLURM_CONF": str(self.configuration)}

    def start(self) -> None:
        """Start everything and wait until all nodes are idle.

        Errors:
            AssertionError: it does not get ready; the logs are in `folder`.
        """
        for name in ("log", "state", "spool"):
            (self.folder / name).mkdir()
        self._start_munge()
        self.start_accounting()
        self._make_gpus()
        self.write_configuration()
        known = Path("/etc/hosts").read_text(encoding="utf-8")
        own = "".join(f"127.0.1.{index} {name}\n" for index, name in enumerate(NODES, start=1))
        (self.folder / "hosts").write_text(own + known, encoding="utf-8")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait_until(self._all_idle, 60, f"the nodes are not idle, see {self.folder}/log", every=0.2)

    def start_accounting(self) -> None:
        """Start what `accounting` names: nothing here, see `accounts`."""

    def write_configuration(self) -> None:
        """Write slurm.conf as the settings of this object are now; `reconfigure` makes it count."""
        host = platform.node().split(".")[0]
        nodes = [
            f"NodeName={name} NodeAddr=127.0.{1 if self.namespaces else 0}.{index if self.namespaces else 1} "
            f"{'' if self.namespaces else f'NodeHostname={host} '}Port={self._node_ports[name]} CPUs=4 "
            f"RealMemory=4000 {'Gres=gpu:2 ' if self.gpus else ''}State=UNKNOWN"
            for index, name in enumerate(NODES, start=1)
        ]
        text = CONFIGURATION.format(
            host=host,
            folder=self.folder,
            controller_port=self._controller_port,
            user_signal="SlurmctldParameters=preempt_send_user_signal" if self.user_signal else "",
            accounting=self.accounting,
            job_age=self.job_age,
            gres="GresTypes=gpu" if self.gpus else "",
            nodes="\n".join(nodes),
        )
        self.configuration.write_text(text, encoding="utf-8")

    def start_controller(self) -> None:
        """Start slurmctld."""
        wrap = ["unshare", "-m"] if self.namespaces else []
        self._start(wrap, ["slurmctld", "-c", "-f", str(self.configuration)], "slurmctld")
        wait_until(lambda: _succeeds(["scontrol", "ping"], self.environment), 30, "slurmctld does not answer")

    def restart_controller(self, *, user_signal: bool) -> None:
        """Another slurmctld over the same state, with or without `preempt_send_user_signal`."""
        self.stop_controller()
        self.user_signal = user_signal
        self.write_configuration()
        wrap = ["unshare", "-m"] if self.namespaces else []
        self._start(wrap, ["slurmctld", "-f", str(self.configuration)], "slurmctld")
        wait_until(self._all_idle, 60, f"the nodes are not idle, see {self.folder}/log", every=0.2)

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs go on without it."""
        self.stop_daemons("slurmctld")

    def stop_daemons(self, *names: str) -> None:
        """End daemons by their pid files, and wait until they are gone."""
        _stop([self.folder / f"{name}.pid" for name in names])

    def start_node(self, node: str) -> None:
        """Start one host's slurmd."""
        wrap = ["unshare", "-m", "-u"] if self.namespaces else []
        command = ["slurmd", "-c", "-N", node, "-f", str(self.configuration)]
        self._start(wrap, command, f"slurmd.{node}", hostname=node)
        wait_until((self.folder / f"slurmd.{node}.pid").exists, 30, f"slurmd of {node} does not start")

    def lose_node(self, node: str) -> None:
        """What a power cut does: slurmd and all that runs on the host are gone at once."""
        slurmd = int((self.folder / f"slurmd.{node}.pid").read_text())
        victims = [pid for pid in self.processes_of(node) if pid != slurmd]
        for pid in (slurmd, *victims):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.folder / f"slurmd.{node}.pid").unlink(missing_ok=True)

    def processes_of(self, node: str) -> list[int]:
        """The processes on a host: those with its hostname, or of its slurmd where all share one."""
        slurmd = int((self.folder / f"slurmd.{node}.pid").read_text())
        mark = f"SLURMD_NODENAME={node}".encode()
        if self.namespaces:  # never take this machine for the host
            assert os.readlink(f"/proc/{slurmd}/ns/uts") != os.readlink("/proc/self/ns/uts")
        found = []
        for pid in _processes():
            try:
                if self.namespaces:
                    same = os.readlink(f"/proc/{pid}/ns/uts") == os.readlink(f"/proc/{slurmd}/ns/uts")
                else:
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    same = mark in environment and self._mine(environment)
            except OSError:  # it has ended
                continue
            if same:
                found.append(pid)
        return found

    def run(self, *command: str, seconds: float = 30) -> str:
        """What a Slurm command of a user prints; it must succeed."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, key by key."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def clear(self) -> None:
        """Cancel all jobs and wait until the nodes are idle again."""
        self.run("scancel", "--user", "root")
        wait_until(self._all_idle, 90, f"jobs do not end, see {self.folder}/log", every=0.2)

    def stop(self, keep: bool = False) -> None:
        """Stop all daemons by their pid files, end what they left behind, and remove the folder."""
        if (self.folder / "slurmctld.pid").exists():
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.clear()
        self.stop_daemons("slurmctld", *(f"slurmd.{node}" for node in NODES), "munged")
        self._end_leftovers()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        options = {
            "--key-file": key,
            "--socket": self.folder / "munge.socket",
            "--pid-file": self.folder / "munged.pid",
            "--log-file": self.folder / "log" / "munged.log",
            "--seed-file": self.folder / "munge.seed",
        }
        command = ["munged", "--force", *(f"{name}={value}" for name, value in options.items())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr

    def _make_gpus(self) -> None:
        """Two devices per host that Slurm takes for GPUs; where the kernel makes no devices, none."""
        lines = []
        for node in NODES:
            folder = self.folder / "dev" / node
            folder.mkdir(parents=True)
            for index in range(2):
                if not _succeeds(["mknod", str(folder / f"nvidia{index}"), "c", "1", "3"]):
                    return
            lines.append(f"NodeName={node} Name=gpu File={folder}/nvidia[0-1]\n")
        (self.folder / "gres.conf").write_text("".join(lines))
        self.gpus = True

    def _start(
        self, wrap: Sequence[str], command: Sequence[str], name: str, hostname: str | None = None
    ) -> None:
        """Start a daemon; inside namespaces with our hosts file and a hostname of its own."""
        full = list(command)
        if wrap:
            own = [f"mount --bind {self.folder}/hosts /etc/hosts"]
            own += [f"hostname {hostname}"] if hostname else []
            full = [*wrap, "bash", "-c", " && ".join([*own, f"exec {shlex.join(command)}"])]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            environment = {"PATH": os.environ["PATH"], "HOME": "/root", **self.environment}
            done = subprocess.run(full, stdout=log, stderr=log, env=environment, timeout=60, check=False)
        assert done.returncode == 0, (self.folder / "log" / f"{name}.out").read_text()

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=low").split("\n")
        known = dict(line.split() for line in states if line)
        running = self.run("squeue", "--noheader", "--states=all", "--format=%T").split()
        ended = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE"}
        return all(known.get(node) == "idle" for node in NODES) and ended.issuperset(running)

    def _mine(self, environment: Sequence[bytes]) -> bool:
        return f"SLURM_CONF={self.configuration}".encode() in environment

    def _end_leftovers(self) -> None:
        for pid in _processes():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            # a job's process, not the test run that has exported the same variable
            if self._mine(environment) and any(word.startswith(b"SLURM_JOB_ID=") for word in environment):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _succeeds(command: Sequence[str], environment: dict[str, str] | None = None) -> bool:
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    return done.returncode == 0


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    ports: list[int] = []
    start = 20_000 + os.getpid() * 16 % 12_000  # far from those of a run that began with us
    for port in range(start, 32_700):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


def _stop(pid_files: Sequence[Path], seconds: float = 15) -> None:
    """End the processes that daemons wrote into their pid files."""
    pids = []
    for path in pid_files:
        with contextlib.suppress(OSError, ValueError):  # never started, or ended before
            pids.append(int(path.read_text()))
            os.kill(pids[-1], signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while any(map(_is_running, pids)):
        if time.monotonic() > deadline:
            for pid in filter(_is_running, pids):
                os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    for path in pid_files:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
