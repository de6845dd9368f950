"""The accounting of a test cluster: a MariaDB and a slurmdbd, private to it, so that `sacct` answers."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from pathlib import Path

from cluster import Cluster, install, wait_until

PACKAGES = ("slurmdbd", "mariadb-server-core", "mariadb-client-core")
NEEDED = ("slurmdbd", "sacct", "mariadbd", "mariadb-install-db", "my_print_defaults")

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=tubeworks
"""

SLURM = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none"""


def missing_accounts() -> str | None:
    """Why there can be no accounting here, after an attempt to install it; None where there can be one."""
    return install(NEEDED, PACKAGES)


class AccountedCluster(Cluster):
    """A cluster whose controller soon forgets jobs, and whose accounts do not."""

    def __init__(self) -> None:
        super().__init__()
        self.job_age = 2
        self._port, self._database_port = self.spare_ports
        self.accounting = SLURM.format(port=self._port, folder=self.folder)

    def start_accounting(self) -> None:
        """Start the database and slurmdbd."""
        password = secrets.token_hex(16)
        start_database(self.folder, self._database_port, password)
        settings = self.folder / "slurmdbd.conf"
        settings.touch(mode=0o600)  # else slurmdbd refuses it: there is a password in it
        ports = {"port": self._port, "database_port": self._database_port}
        settings.write_text(SLURMDBD.format(folder=self.folder, password=password, **ports))
        # the commands read it too, and want no more than to know where slurmdbd is
        self.configuration.write_text(f"ClusterName=tubeworks\nSlurmctldHost=localhost\n{self.accounting}\n")
        self.start_slurmdbd()

    def start_slurmdbd(self) -> None:
        """Start slurmdbd, and wait until it answers."""
        with (self.folder / "log" / "slurmdbd.out").open("ab") as out:
            env = {**os.environ, **self.environment}
            subprocess.run(["slurmdbd"], stdout=out, stderr=out, env=env, timeout=60, check=True)

        def answers() -> bool:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                return bool(self.run("sacctmgr", "show", "cluster"))
            return False

        wait_until(answers, 60, f"slurmdbd does not answer, see {self.folder}/log", every=0.2)

    def stop(self, keep: bool = False) -> None:
        """Stop the accounts after the rest."""
        super().stop(keep=True)
        for name in ("slurmdbd", "mariadbd"):  # the database last
            self.stop_daemons(name)
        if not keep:
            super().stop()


def start_database(folder: Path, port: int, password: str) -> None:
    """A MariaDB of our own; what it keeps need not survive a power cut."""
    data, log = folder / "database", folder / "log" / "mariadbd.log"
    common = ["--no-defaults", "--user=root", f"--datadir={data}"]
    make = [*common, "--auth-root-authentication-method=normal", "--skip-test-db"]
    with log.open("ab") as out:
        subprocess.run(["mariadb-install-db", *make], stdout=out, stderr=out, timeout=120, check=True)
        first = folder / "first.sql"  # one statement a line
        first.touch(mode=0o600)
        user = "slurm@127.0.0.1"
        first.write_text(f"CREATE USER {user} IDENTIFIED BY '{password}';\nGRANT ALL ON *.* TO {user};\n")
        options = {
            "socket": folder / "mariadb.socket",
            "pid-file": folder / "mariadbd.pid",
            "port": port,
            "bind-address": "127.0.0.1",
            "init-file": first,
            "innodb-buffer-pool-size": "32M",
            "innodb-flush-log-at-trx-commit": 0,
        }
        words = [*common, "--skip-name-resolve", *(f"--{name}={value}" for name, value in options.items())]
        subprocess.Popen(["mariadbd", *words], stdout=out, stderr=out, start_new_session=True)
    wait_until(
        lambda: "ready for connections" in log.read_text(), 60, f"the database does not start, see {log}"
    )
