"""PgBouncer before a cluster of the tests' own: every transaction of a client may get another session of the server."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from .agent import PATIENCE
from .postgres import ADMIN, Cluster
from .skip_unless import PGBOUNCER

PORT = 6_432
"""Part of a Unix socket's name: no port is used."""


class Bouncer:
    """A PgBouncer in transaction mode, with fewer sessions than clients. To be entered; `restart` is an operator's."""

    def __init__(self, cluster: Cluster) -> None:
        assert PGBOUNCER is not None
        self._program = PGBOUNCER
        self._cluster = cluster
        self.folder = Path(tempfile.mkdtemp(prefix="kf-pb-"))
        self._user: dict[str, Any] = {}

    def __enter__(self) -> Self:
        (self.folder / "users").write_text(f'"{ADMIN}" ""\n')
        (self.folder / "pgbouncer.ini").write_text(
            "[databases]\n"
            f"* = host={self._cluster.folder}\n"
            "[pgbouncer]\n"
            f"listen_port = {PORT}\n"
            f"unix_socket_dir = {self.folder}\n"
            "auth_type = trust\n"
            f"auth_file = {self.folder}/users\n"
            f"admin_users = {ADMIN}\n"
            f"logfile = {self.folder}/log\n"
            "pool_mode = transaction\n"
            "default_pool_size = 3\n"
            "server_login_retry = 0.1\n"
        )
        if os.geteuid() == 0:  # it does not run as root
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self._start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()
        shutil.rmtree(self.folder)

    def restart(self) -> None:
        """Break the connections of all clients."""
        self._stop()
        self._start()

    def url(self, direct: str) -> str:
        """The URL of a database through this PgBouncer, by the URL that leads to the cluster."""
        return f"{direct.partition('?')[0]}?host={self.folder}&port={PORT}"

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, "-q", str(self.folder / "pgbouncer.ini")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            **self._user,
        )
        end = time.monotonic() + PATIENCE
        while not (self.folder / f".s.PGSQL.{PORT}").exists():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)  # immediately, with clients connected
        self._process.wait(PATIENCE)
