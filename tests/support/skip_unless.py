"""Requirements beyond Python packages: a test skips with a reason that names its need, and the run ends with the list."""

import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .quota import has_cpu_quota

ROOT = Path(__file__).parents[2]
NODE_MODULES = ROOT / ".cache" / "node" / "node_modules"
CACHE = ROOT / ".cache" / "hosts"
FOREIGN = ROOT / ".cache" / "foreign"
"""Libraries of other languages, which .ci/provide fetches."""
BOUNCY_CASTLE = FOREIGN / "bcprov-jdk18on-1.81.jar"
GO_MODULES = FOREIGN / "go"
BASE = CACHE / "debian.tar"
"""A small Debian with Python, as the base of images: .ci/provide makes it."""
WYCHEPROOF = Path(os.environ.get("KEYFERRY_WYCHEPROOF", ROOT.parent / "shared" / "vectors"))
POSTGRESQL = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
"""The programs of a PostgreSQL server, where Debian puts them."""
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
"""PgBouncer, which Debian installs where only root's PATH leads."""


def program(name: str, package: str) -> pytest.MarkDecorator:
    """Skip where a program is not installed; `package` is Debian's package of it."""
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"needs the program {name} (Debian package {package})")


def installed(name: str, how: str) -> pytest.MarkDecorator:
    """Skip where a Python package's program is not in this environment."""
    missing = not Path(sys.executable).with_name(name).is_file()
    return pytest.mark.skipif(missing, reason=f"needs the program {name} in this environment: {how}")


def base_image() -> pytest.MarkDecorator:
    """Skip without a file system to build an image on."""
    return pytest.mark.skipif(not BASE.is_file(), reason=f"needs {BASE.relative_to(ROOT)}, which .ci/provide makes")


def root(purpose: str = "to become a second user") -> pytest.MarkDecorator:
    """Skip where the test is not run by root."""
    return pytest.mark.skipif(os.geteuid() != 0, reason=f"needs root, {purpose}: run sudo make test")


def cpu_quota() -> pytest.MarkDecorator:
    """Skip where no control group with a CPU quota can be made."""
    return pytest.mark.skipif(not has_cpu_quota(), reason="needs root, and a control group with the cpu controller")


def node_module(name: str) -> pytest.MarkDecorator:
    """Skip where an npm package was not provided."""
    missing = shutil.which("node") is None or not (NODE_MODULES / name).is_dir()
    return pytest.mark.skipif(missing, reason=f"needs node and npm's {name}")


def missing_java(*jars: Path) -> str | None:
    """Return why a test of Java has to be skipped: no JDK, or a jar that was not provided; None where all is there."""
    if shutil.which("javac") is None:
        return "needs the program javac (Debian package default-jdk-headless)"
    absent = [jar.name for jar in jars if not jar.is_file()]
    return f"needs {', '.join(absent)} in {FOREIGN.relative_to(ROOT)}, which .ci/provide fetches" if absent else None


def go_module(path: str, version: str) -> Path:
    """The folder with provided Go modules; skips where a module, or Go, is missing."""
    if shutil.which("go") is None:
        pytest.skip("needs the program go (Debian package golang-go)")
    if not (GO_MODULES / f"{path}@{version}").is_dir():
        pytest.skip(f"needs Go's {path} {version} in {GO_MODULES.relative_to(ROOT)}, which .ci/provide fetches")
    return GO_MODULES


def wycheproof(name: str) -> Path:
    """The path of a Wycheproof file; skips where the vectors are not at hand (KEYFERRY_WYCHEPROOF names their folder)."""
    path = WYCHEPROOF / name
    if not path.is_file():
        pytest.skip(f"needs Wycheproof's {name} in the folder that KEYFERRY_WYCHEPROOF names")
    return path


def library(pattern: str, package: str) -> Path:
    """The path of a shared library, by a pattern below /usr/lib; skips where it is not installed."""
    found = sorted(Path("/usr/lib").glob(pattern))
    if not found:
        pytest.skip(f"needs {Path(pattern).name} (Debian package {package})")
    return found[0]


@functools.cache
def _openssl_sm2() -> bool:
    if shutil.which("openssl") is None:
        return False
    arguments = ["openssl", "genpkey", "-algorithm", "SM2"]
    return subprocess.run(arguments, capture_output=True, check=False).returncode == 0


def openssl_sm2() -> pytest.MarkDecorator:
    """Skip where the openssl program is missing, or was built without SM2."""
    return pytest.mark.skipif(not _openssl_sm2(), reason="needs the program openssl with SM2 (Debian package openssl)")


def postgresql() -> pytest.MarkDecorator:
    """Skip without a PostgreSQL server."""
    return pytest.mark.skipif(POSTGRESQL is None, reason="needs a PostgreSQL server (Debian package postgresql)")


def pgbouncer() -> pytest.MarkDecorator:
    """Skip without PgBouncer or a PostgreSQL server."""
    missing = PGBOUNCER is None or POSTGRESQL is None
    return pytest.mark.skipif(missing, reason="needs PgBouncer and PostgreSQL (Debian packages pgbouncer, postgresql)")


@functools.cache
def _libpq() -> bool:
    try:
        importlib.import_module("psycopg")
    except ImportError:
        return False
    return True


def libpq() -> pytest.MarkDecorator:
    """Skip where psycopg does not find the system's library for PostgreSQL clients."""
    return pytest.mark.skipif(not _libpq(), reason="needs libpq (Debian package libpq5)")


def fuse() -> pytest.MarkDecorator:
    """Skip where no file system can be served from user space."""
    missing = not os.path.exists("/dev/fuse")
    return pytest.mark.skipif(missing, reason="needs /dev/fuse: modprobe fuse")


def unified_cgroups() -> Path:
    """Return the folder of the unified control groups; skip if no group can be made there."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(folder, os.W_OK):
            return Path(folder)
    pytest.skip("needs a writable file system of unified control groups (cgroup2)")
