"""Looks all that is pinned up in a database of known vulnerabilities: `make audit`, `python -m support.advisories`.

pip-audit calls it a success when it was told nothing. So a release that is known to be vulnerable is asked for first: only who
finds that one is believed about others. Exit codes: 0 nothing is known; 1 something is; 3 it could not be found out.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

ROOT: Final = Path(__file__).parents[2]
FILES: Final = sorted([*ROOT.glob(".ci/requirements*.txt"), *ROOT.glob("deploy/requirements*.txt")])
SERVICES: Final = ("pypi", "osv")
KNOWN: Final = ("cryptography==42.0.0", "CVE-2024-26130")
"""A release and its known, permanent advisories."""
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3
_PATIENCE: Final = 600.0

Report: TypeAlias = list[dict[str, Any]]
Ask: TypeAlias = Callable[[str, Sequence[Path]], Report | None]
"""Return a service's advisories for each requirement in some files; None if it does not answer."""


def pip_audit(service: str, files: Sequence[Path]) -> Report | None:
    """Ask by pip-audit, which is in this environment."""
    arguments = ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off", "--disable-pip"]
    asked = subprocess.run(
        [Path(sys.executable).with_name("pip-audit"), *arguments, *(f"--requirement={file}" for file in files)],
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    try:
        report: Report = json.loads(asked.stdout)["dependencies"]
    except ValueError:
        return None
    return report


def main(ask: Ask = pip_audit) -> int:
    """Find a service that knows the permanent advisories, and query it for all files."""
    service = next((service for service in SERVICES if _knows(service, ask)), None)
    if service is None:
        return _unknown(
            f"no database of vulnerabilities can be reached from here ({' and '.join(SERVICES)} were tried)"
        )
    report = ask(service, FILES)
    if report is None:
        return _unknown(f"{service} no longer answers")
    found = sorted({line for each in report for line in _lines(each)})
    skipped = sorted(each["name"] for each in report if "skip_reason" in each)
    print("\n".join(found) or "No vulnerability is known", f"({len(report)} releases, by {service})")
    if found:
        return VULNERABLE
    return _unknown(f"{service} knows nothing of {', '.join(skipped)}") if skipped else CLEAN


def _knows(service: str, ask: Ask) -> bool:
    release, known = KNOWN
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(f"{release} --hash=sha256:{'0' * 64}\n")
        file.flush()
        report = ask(service, [Path(file.name)]) or []
    return any(known in (name, *others) for each in report for name, others in _vulnerabilities(each))


def _vulnerabilities(release: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(each["id"], each.get("aliases", [])) for each in release.get("vulns", [])]


def _lines(release: dict[str, Any]) -> list[str]:
    fixed = {each["id"]: ", ".join(each.get("fix_versions", [])) or "none" for each in release.get("vulns", [])}
    return [
        f"{release['name']} {release['version']}: {' '.join([name, *others])}; fixed in: {fixed[name]}"
        for name, others in _vulnerabilities(release)
    ]


def _unknown(why: str) -> int:
    print(f"NOT AUDITED: {why}.\nWhether something in use is known to be vulnerable is not known.", file=sys.stderr)
    return UNKNOWN


if __name__ == "__main__":
    sys.exit(main())
