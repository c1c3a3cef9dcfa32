"""A machine with a real systemd: nspawn boots the host's own root file system under a throw-away overlay. It takes root."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from .agent import PATIENCE
from .skip_unless import ROOT

HOME = "/opt/keyferry"
"""Where the product is installed in the machine: a virtual environment of the system's Python."""
_OF_THE_KERNEL = ["--capability=CAP_IPC_LOCK", "--system-call-filter=memfd_secret @keyring @memlock"]
"""The capabilities that nspawn takes from its machines, and no host takes from its services."""


class Machine:
    """Booted when it is entered; forgotten when it is left. `lower`: the root file system that it is made of, by default this
    host's; KEYFERRY_MACHINE names another, with systemd and Python 3.11 or newer in it (debootstrap makes one).
    """

    def __init__(self, lower: Path | None = None, *, extra: str = "") -> None:
        """`extra`: of the client, to be installed, too."""
        self._extra = f"[{extra}]" if extra else ""
        self._folder = Path(tempfile.mkdtemp(prefix="keyferry-machine-"))
        self.root = self._folder / "root"
        self._lower = lower or Path(os.environ.get("KEYFERRY_MACHINE", "/"))
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Self:
        try:
            self._mount()
            self._install()
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self.run("systemctl", "poweroff", "--force", "--force", check=False)
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for mounted in (self.root, self._folder):
            subprocess.run(["umount", "--lazy", mounted], check=False, stderr=subprocess.DEVNULL)
        self._folder.rmdir()

    def _mount(self) -> None:
        """A tmpfs for the overlay: the machine's writes are discarded with it."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", self._folder], check=True)
        upper, work = self._folder / "upper", self._folder / "work"
        for made in (upper, work, self.root):
            made.mkdir()
        layers = f"lowerdir={self._lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", self.root], check=True)
        (self.root / "etc/machine-id").unlink(missing_ok=True)

    def _install(self) -> None:
        """The two distributions, as an operator installs them: into a virtual environment, by their wheels."""
        made = self.root / "srv/wheels"
        for distribution in ("client", "agent"):
            command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(made), str(ROOT / distribution)]
            subprocess.run(command, check=True, capture_output=True)
        self._wheels = [
            f"{wheel}[metrics]" if "agent" in wheel.name else f"{wheel}{self._extra}" for wheel in made.iterdir()
        ]
        chroot = ["chroot", str(self.root)]
        subprocess.run([*chroot, "/usr/bin/python3", "-m", "venv", "--without-pip", HOME], check=True)
        version = "import sys; print('%d.%d' % sys.version_info[:2])"
        self._python = subprocess.check_output([*chroot, "/usr/bin/python3", "-c", version], text=True).strip()
        self.install()
        for name, module in (("keyferry", "keyferry"), ("keyferry-agent", "keyferry_agent")):
            script = self.root / "usr/local/bin" / name
            script.write_text(
                f"#!{HOME}/bin/python\nimport sys\nfrom {module}.__main__ import main\nsys.exit(main())\n"
            )
            script.chmod(0o755)

    def install(self) -> None:
        """Install the built distributions, again if need be, for the machine's Python, which may be another version."""
        target = f"{self.root}{HOME}/lib/python{self._python}/site-packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", target, *self._wheels]
        options = ["--python-version", self._python, "--only-binary=:all:", "--disable-pip-version-check"]
        subprocess.run([*command, *options, "--root-user-action=ignore"], check=True, capture_output=True)

    def _boot(self) -> None:
        name = f"keyferry-{os.getpid()}"  # a host's name: not the folder's, which may have an underscore
        console = self._folder / "console"
        command = ["systemd-nspawn", "-q", "-D", str(self.root), "--boot", "--private-network", f"--machine={name}"]
        options = ["--register=no", "--keep-unit", *_OF_THE_KERNEL, "--", "systemd.unit=multi-user.target"]
        with open(console, "wb") as out:
            self._process = subprocess.Popen(
                [*command, *options], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + PATIENCE
        while self.run("systemctl", "is-system-running", "--wait", check=False) not in ("running", "degraded"):
            assert time.monotonic() < deadline
            assert self._process.poll() is None, console.read_text(errors="replace")
            self._leader = self._first()

    def _first(self) -> int:
        """Return the machine's first process; 0 before its start."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for child in children:
            with suppress(OSError):  # nspawn's own helper, which ends
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return int(child)
        return 0

    def run(self, *command: str, check: bool = True, user: str | None = None, given: str | None = None) -> str:
        """Run a command in the machine, as root or another user; return its output. `given` is its standard input."""
        become = ["runuser", "-u", user, "--"] if user else []
        enter = ["nsenter", "--target", str(self._leader), "--all", "--", "/usr/bin/env", "-i"]
        if not self._leader:
            return ""
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        ended = subprocess.run(
            [*enter, path, *become, *command],
            capture_output=True,
            text=True,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            check=False,
            timeout=PATIENCE,
        )
        assert not check or ended.returncode == 0, (command, ended.stdout, ended.stderr)
        return ended.stdout.strip()

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command in the machine; the caller waits for it."""
        enter = ["nsenter", "--target", str(self._leader), "--all", "--", *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(enter, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def write(self, path: str, text: str) -> None:
        """Write a file in the machine; its folder is made."""
        file = self.root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit)

    def wait_until(self, what: Sequence[str], wanted: str) -> None:
        """Run a command again and again, until it prints this."""
        deadline = time.monotonic() + PATIENCE
        while (said := self.run(*what, check=False)) != wanted:
            assert time.monotonic() < deadline, said
