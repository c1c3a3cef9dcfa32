"""Podman with a storage of its own, for pods without a registry, a network or a kubelet."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from .agent import PATIENCE
from .skip_unless import BASE, CACHE, ROOT

AGENT_IMAGE = "localhost/keyferry-agent"
_BASE_IMAGE = "localhost/keyferry-base:test"
_LIMITS = {"nofile": 4_096, "nproc": 4_096, "memlock": 65_536}
"""Of every container. Memory to lock: the least that a node allows (systemd's default before Linux 5.16)."""
_BUILDING = 300.0
"""Seconds for the slowest steps: unpacking a file system, and building an image on it."""


class Podman:
    """Runs podman; removes every pod, container and image that it made. To be entered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pods: list[str] = []
        self._volumes: list[str] = []
        self._images: list[str] = []
        configuration = folder / "containers.conf"
        # podman sets limits of its own above those of a machine's root; with cgroups it would need systemd.
        ulimits = ", ".join(f'"{name}={value}:{value}"' for name, value in _LIMITS.items())
        configuration.write_text(
            f"[containers]\ndefault_ulimits = [{ulimits}]\npids_limit = 0\n"
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )
        self._environment = {**os.environ, "CONTAINERS_CONF": str(configuration)}
        self._command = [
            "podman",
            *("--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--tmpdir", str(folder / "tmp")),
            *("--runtime", "runc"),  # crun refuses version 1 of control groups beside version 2
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for kind, names in (("pod", self._pods), ("volume", self._volumes)):
            for name in names:
                self.run(kind, "rm", "--force", "--time=0", name, check=False)
        pause = self.run("images", "--quiet", "localhost/podman-pause", check=False).stdout.split()
        self.run("rmi", "--force", *self._images, *pause, check=False)
        subprocess.run(["umount", self._folder / "storage" / "overlay"], check=False, capture_output=True)
        shutil.rmtree(self._folder)

    def arguments(self, *arguments: object) -> list[str]:
        """The whole command line."""
        return [*self._command, *map(str, arguments)]

    def popen(self, *arguments: object) -> "subprocess.Popen[str]":
        """Start podman, with its input and its output to be written and read."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.arguments(*arguments), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=self._environment
        )

    def run(
        self, *arguments: object, check: bool = True, timeout: float = PATIENCE
    ) -> "subprocess.CompletedProcess[str]":
        """Run podman to its end."""
        ended = subprocess.run(
            self.arguments(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=self._environment,
        )
        assert ended.returncode == 0 or not check, f"podman {arguments}: {ended.stderr}{ended.stdout}"
        return ended

    def inspect(self, container: str, what: str) -> Any:
        """One thing that podman knows of a container."""
        return json.loads(self.run("inspect", "--format", f"{{{{json {what}}}}}", container).stdout)

    def log(self, container: str) -> list[dict[str, Any]]:
        """Return the log of an agent in a container."""
        return [json.loads(line) for line in self.run("logs", container).stderr.splitlines() if line.startswith("{")]

    def play(self, pod: dict[str, Any], configuration: Sequence[dict[str, Any]], path: Path) -> None:
        """Run a pod, and wait until its containers were started. What it claims are volumes like a kubelet's in memory."""
        for volume in pod["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume:
                name = volume["persistentVolumeClaim"]["claimName"]
                self._volumes.append(name)
                options = f"uid=0,gid={pod['spec']['securityContext']['fsGroup']},mode=3777"
                self.run("volume", "create", "--opt=type=tmpfs", "--opt=device=tmpfs", f"--opt=o={options}", name)
        self._pods.append(pod["metadata"]["name"])
        path.write_text(yaml.safe_dump_all([*configuration, pod]))
        self.run("kube", "play", "--network=none", path)

    def build_agent(self, tag: str) -> None:
        """Build the agent's image from this checkout, on a local file system and from local wheels."""
        self._images += [_BASE_IMAGE, f"{AGENT_IMAGE}:{tag}"]
        self.run("import", "--quiet", BASE, _BASE_IMAGE, timeout=_BUILDING)
        version = "import sys; print('%d.%d' % sys.version_info[:2])"
        python = self.run(
            "run", "--rm", "--network=none", _BASE_IMAGE, "/usr/bin/python3", "-c", version
        ).stdout.strip()
        for old in (ROOT / "dist").glob("keyferry*.whl"):
            old.unlink()
        for distribution in ("client", "agent"):
            command = [
                sys.executable,
                "-m",
                "build",
                "--wheel",
                "--outdir",
                str(ROOT / "dist"),
                str(ROOT / distribution),
            ]
            subprocess.run(command, check=True, capture_output=True, timeout=_BUILDING)
        wheels = download(python)
        offline = self._folder / "pip.conf"
        offline.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        self.run(
            *("build", "--isolation=chroot", "--layers=false", "--quiet", "--build-arg", f"BASE={_BASE_IMAGE}"),
            *("--volume", f"{offline}:/etc/pip.conf:ro", "--volume", f"{wheels}:/wheels:ro"),
            *("--file", ROOT / "deploy" / "Containerfile", "--tag", f"{AGENT_IMAGE}:{tag}", ROOT),
            timeout=_BUILDING,
        )


def download(python: str) -> Path:
    """Download the agent's dependencies for a version of Python, into a folder that is kept. Return the folder."""
    wheels = CACHE / "wheels"
    command = [sys.executable, "-m", "pip", "--quiet", "download", "--python-version", python, "--only-binary=:all:"]
    options = ["--require-hashes", "--dest", str(wheels), "-r", str(ROOT / "deploy" / "requirements.txt")]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=_BUILDING)
    return wheels
