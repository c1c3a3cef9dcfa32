"""Pinned packages meet the declared dependencies, with hashes, in one version everywhere; audits are honest."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support import advisories
from support.advisories import CLEAN, FILES, KNOWN, UNKNOWN, VULNERABLE, Report
from support.skip_unless import ROOT

PINNED = re.compile(r"^([\w.-]+)==([\w.!+-]+)(.*)$", re.MULTILINE)


def project(path: str) -> dict[str, Any]:
    """A pyproject.toml."""
    return tomllib.loads((ROOT / path / "pyproject.toml").read_text())


def pinned(path: Path) -> dict[str, str]:
    """The versions in a file, by name."""
    return {name: version for name, version, _ in PINNED.findall(path.read_text())}


def asked(path: str, *, extras: bool) -> list[str]:
    """Return the dependencies of a distribution."""
    of_project = project(path)["project"]
    optional = of_project["optional-dependencies"].values() if extras else ()
    return [*of_project["dependencies"], *(each for extra in optional for each in extra)]


GROUPS = project(".")["dependency-groups"]
ASKED = {
    ".ci/requirements.txt": [*asked("client", extras=True), *asked("agent", extras=True), *GROUPS["dev"]],
    "deploy/requirements.txt": asked("agent", extras=True),
    "deploy/requirements-client.txt": asked("client", extras=True),
    **{f".ci/requirements-{group}.txt": GROUPS[group] for group in ("audit", "fuzz", "hosts", "mutants")},
}


def test_every_file_of_requirements_is_checked() -> None:
    """These tests and `make audit` cover all files of requirements."""
    assert {str(path.relative_to(ROOT)) for path in FILES} == ASKED.keys()


@pytest.mark.parametrize("file", ASKED)
def test_pinned_versions_meet_the_declared_dependencies(file: str) -> None:
    """Each dependency is pinned in an allowed version; after a change to a pyproject.toml, run `make requirements`."""
    versions = pinned(ROOT / file)
    for requirement in map(Requirement, ASKED[file]):
        if requirement.name not in ("keyferry", "keyferry-agent"):
            assert requirement.specifier.contains(versions[requirement.name]), f"make requirements: {requirement}"


@pytest.mark.parametrize("file", ASKED)
def test_pinned_packages_have_hashes_and_no_index(file: str) -> None:
    """An installation may use an index of its own."""
    text = (ROOT / file).read_text()
    assert "//" not in text
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(PINNED.findall(text))
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_a_package_has_one_version_in_all_files() -> None:
    """Deployed versions are the tested ones."""
    versions: dict[str, set[str]] = {}
    for file in FILES:
        for name, version in pinned(file).items():
            versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


KNOWN_ONE = {"name": "cryptography", "version": "42.0.0", "vulns": [{"id": "PYSEC-1", "aliases": [KNOWN[1]]}]}
GOOD = {"name": "msgpack", "version": "1.2.4", "vulns": []}
BAD = {"name": "trio", "version": "0.35.0", "vulns": [{"id": "PYSEC-2", "fix_versions": ["0.36.0"]}]}
SKIPPED = {"name": "gmssl", "skip_reason": "Dependency not found and could not be audited"}


@pytest.mark.parametrize(
    ("first", "then", "code", "expected"),
    [
        ([KNOWN_ONE], [GOOD], CLEAN, "No vulnerability is known"),
        ([KNOWN_ONE], [GOOD, BAD], VULNERABLE, "trio 0.35.0: PYSEC-2; fixed in: 0.36.0"),
        ([KNOWN_ONE], [GOOD, BAD, SKIPPED], VULNERABLE, "PYSEC-2"),
        ([KNOWN_ONE], [GOOD, SKIPPED], UNKNOWN, "NOT AUDITED: pypi knows nothing of gmssl"),
        ([KNOWN_ONE], None, UNKNOWN, "NOT AUDITED: pypi no longer answers"),
        ([{"name": "cryptography", "version": "42.0.0", "vulns": []}], [GOOD], UNKNOWN, "NOT AUDITED: no database"),
        ([{"name": "cryptography", "skip_reason": "not found"}], [GOOD], UNKNOWN, "NOT AUDITED: no database"),
        (None, [GOOD], UNKNOWN, "NOT AUDITED: no database"),
    ],
)
def test_uninformed_advisory_service_is_not_used(
    capsys: pytest.CaptureFixture[str], first: Report | None, then: Report | None, code: int, expected: str
) -> None:
    """A service that does not find a known vulnerability is not queried further."""

    def ask(service: str, files: Sequence[Path]) -> Report | None:
        assert service == "pypi" or first != [KNOWN_ONE]
        return then if files == FILES else first

    assert advisories.main(ask) == code
    captured = capsys.readouterr()
    assert expected in captured.out + captured.err


def test_program_without_a_report_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip-audit prints no report without a network."""
    program = tmp_path / "pip-audit"
    program.write_text("#!/bin/sh\necho oops; exit 1\n")
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert advisories.pip_audit("osv", FILES) is None
    program.write_text(
        """#!/bin/sh\necho '{"dependencies": [{"name": "x", "version": "1", "vulns": []}], "fixes": []}'\n"""
    )
    assert advisories.pip_audit("osv", FILES) == [{"name": "x", "version": "1", "vulns": []}]
