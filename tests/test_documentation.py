"""The documentation agrees with the code: tables, links, versions, and the commands that it shows."""

import re
import tomllib
from pathlib import Path

import generate_docs
import pytest

import keyferry
import keyferry_agent
from keyferry_agent.config import settings
from keyferry_agent.crypto import ciphertext_blob

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])


def test_protocol_page_has_the_tables_of_the_declarations() -> None:
    """`make docs` writes the tables."""
    text = generate_docs.PROTOCOL.read_text()
    assert generate_docs.generated(text) == text, "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    """Every relative link in the documentation names an existing file."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_distributions_have_one_version() -> None:
    """The agent requires exactly the client of its own release."""
    agent = tomllib.loads((ROOT / "agent" / "pyproject.toml").read_text())["project"]
    assert keyferry_agent.__version__ == keyferry.__version__
    assert f"keyferry=={keyferry.__version__}" in agent["dependencies"]
    heading = "Unreleased" if ".dev" in keyferry.__version__ else keyferry.__version__
    assert f"## [{heading}]" in (ROOT / "CHANGELOG.md").read_text()


def test_shell_completion_matches_the_declarations() -> None:
    """`make docs` writes the completion."""
    for path, text in generate_docs.completions():
        assert path.read_text() == text, "run make docs"


def test_the_example_configurations_are_good(tmp_path: Path) -> None:
    """Every TOML example in the documentation is accepted by `check`."""
    found = 0
    for page in PAGES:
        for example in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
            path = tmp_path / "example.toml"
            path.write_text(example)
            settings.read(path)
            found += 1
    assert found


def test_the_ciphertext_page_has_the_sizes_of_the_code() -> None:
    """A CiphertextBlob is 117 bytes longer than its parts on the page and in the code."""
    text = (ROOT / "docs" / "ciphertext.md").read_text()
    assert f"a blob is {ciphertext_blob.OVERHEAD} bytes longer" in text
    assert all(suite.info.decode() in text for suite in ciphertext_blob._SUITES.values())


def test_every_setting_is_explained() -> None:
    """docs/configuration.md names each setting."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    names = [*settings.Limits.__dataclass_fields__, *settings.Settings.__dataclass_fields__]
    options = {"development_aliases", "development_access_key"}
    for name in set(names) - {"listeners", "grants", "names", "warnings"} - options:
        assert f"`{name}`" in text or f"`[{name}]`" in text, name


def test_every_event_of_the_log_is_explained() -> None:
    """agent/README.md names exactly the events that the agent logs."""
    code = "".join(path.read_text() for path in (ROOT / "agent" / "keyferry_agent").rglob("*.py"))
    logged = set(re.findall(r'log\.(?:info|warning|error)\(\s*"([a-z_]+\.[a-z_]+)"', code))
    table = (ROOT / "agent" / "README.md").read_text().split("## The log")[1].split("With `[audit]` unset")[0]
    assert logged == set(re.findall(r"`([a-z_]+\.[a-z_]+)`", table))


def test_dashboard_uses_existing_metrics() -> None:
    """Each metric of the dashboard is one of the agent's."""
    asked = set(re.findall(r"keyferry_[a-z_]+", (ROOT / "deploy" / "grafana-dashboard.json").read_text()))
    text = (ROOT / "agent" / "README.md").read_text()
    for name in asked:
        assert f"`{name.removesuffix('_bucket')}" in text, name
