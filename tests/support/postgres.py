"""A PostgreSQL server of the tests' own: a cluster in a temporary folder, on a Unix socket, of a user that is not root."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

from .skip_unless import POSTGRESQL

ADMIN = "keyferry"


class Cluster:
    """To be entered. `stop` and `start` are an operator's, or a power failure's."""

    def __init__(self, *, durable: bool = False) -> None:
        assert POSTGRESQL is not None
        self._bin = POSTGRESQL
        self._user: dict[str, Any] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="kf-pg-"))  # short: a socket's path has at most 107 bytes
        self._data = self.folder / "data"
        self._settings = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}'"
        if not durable:
            self._settings += " -c fsync=off"  # a server that is killed loses nothing by it; a host would
        self._databases = 0

    def __enter__(self) -> Self:
        if os.geteuid() == 0:  # initdb does not run as root
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self._run(
            "initdb", "--auth=trust", f"--username={ADMIN}", "--encoding=UTF8", "--no-sync", "-D", str(self._data)
        )
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        log = str(self.folder / "log")
        self._run("pg_ctl", "start", "--wait", "-D", str(self._data), "-l", log, "-o", self._settings)

    def stop(self) -> None:
        """Stop the server immediately, whatever it is doing: it recovers at its next start."""
        self._run("pg_ctl", "stop", "--wait", "-m", "immediate", "-D", str(self._data))

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"test{self._databases}"
        self._run("createdb", "-h", str(self.folder), "-U", ADMIN, name)
        return f"postgresql://{ADMIN}@/{name}?host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._bin / program, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            **self._user,
        )
