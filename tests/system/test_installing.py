"""Wheels are built, installed and upgraded by the commands of docs/installing.md, without an index for keyferry itself."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.podman import download
from support.skip_unless import CACHE, ROOT

pytestmark = pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs /usr/bin/python3")
SECONDS = 300.0
PAGE = ROOT / "docs" / "installing.md"


class Builder:
    """A copy of the tree that is committed, built and installed in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.tree.mkdir(parents=True)
        for name in ("client", "agent", ".ci", "deploy"):
            shutil.copytree(ROOT / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "bin").mkdir()
        self._places = {"/opt/keyferry": f"{folder}/opt", "/usr/local/bin": f"{folder}/bin"}
        self.program = folder / "bin" / "keyferry-agent"
        self.python = folder / "opt" / "bin" / "python"
        self.run("git init --quiet .")
        self.commit()

    def run(self, script: str, **environment: str) -> str:
        """Run a script in the tree, and return its output."""
        for place, instead in self._places.items():
            script = script.replace(place, instead)
        own = {
            "PATH": f"{self.program.parent}:/usr/bin:/bin",
            "HOME": str(self.tree),
            "GIT_AUTHOR_NAME": "a",
            "GIT_COMMITTER_NAME": "a",
        }
        mail = {"GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_EMAIL": "a@example.org"}
        ended = subprocess.run(
            ["bash", "-ec", script],
            cwd=self.tree,
            env={**{k: v for k, v in os.environ.items() if k.startswith("PIP_")}, **own, **mail, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout.strip()

    def commit(self) -> str:
        """Commit the tree, and return the commit."""
        self.run("printf '__pycache__\\ndist\\n' > .gitignore; git add --all; git commit --quiet --message x")
        return self.run("git rev-parse --short=12 HEAD")

    def build(self) -> str:
        """Build the wheels, and return their version."""
        self.run(".ci/wheels /usr/bin/python3 /nonexistent dist")
        return (self.tree / "dist/VERSION").read_text().strip()

    def type(self, heading: str, *, beginning: int = 0) -> str:
        """Type the commands of a heading, without an index."""
        section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
        return self.run("\n".join(lines[beginning:]), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(CACHE / "wheels"))


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """A tree with its own commits, and the dependencies in a folder."""
    version = subprocess.check_output(
        ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    download(version)
    return Builder(tmp_path_factory.mktemp("installing"))


def test_a_build_is_installed_and_replaced_by_the_next(builder: Builder) -> None:
    """Pip replaces the code of an installed build although both builds have the same development version."""
    first = builder.build()
    commit = builder.run("git rev-parse --short=12 HEAD")
    assert first.endswith(f"+g{commit}")
    builder.run("cd dist && sha256sum --check --strict SHA256SUMS")
    assert builder.type("An agent").endswith(f"keyferry-agent {first}")
    assert builder.run(f"{builder.python} -c 'import prometheus_client'") == ""
    with open(builder.tree / "agent/keyferry_agent/__init__.py", "a") as file:
        file.write('\n\nNEW = "new code"\n')
    changed = builder.build()
    assert changed.startswith(f"{first}.d")
    second = f"{first.partition('+')[0]}+g{builder.commit()}"
    assert builder.build() == second
    assert len(list((builder.tree / "dist").glob("*.whl"))) == 2
    assert builder.type("An agent", beginning=1).endswith(f"keyferry-agent {second}")
    assert builder.run(f"{builder.python} -c 'import keyferry_agent; print(keyferry_agent.NEW)'") == "new code"
    code = "from importlib.metadata import requires; print(*requires('keyferry-agent'), sep='\\n')"
    required = builder.run(f'{builder.python} -c "{code}"').splitlines()
    assert [each for each in required if each.startswith("keyferry")] == [f"keyferry=={second}"]


def test_extras_resolve_in_one_command_with_an_old_pip(builder: Builder) -> None:
    """The pip of `/usr/bin/python3 -m venv` installs the page's command for an application, and both distributions."""
    version = builder.build()
    section = PAGE.read_text().split("## An application")[1]
    (command,) = [line[4:] for line in section.splitlines() if line.startswith("    pip install")]
    both = f'{command.replace("module,store", "module")} "keyferry-agent[metrics]==$(cat dist/VERSION)"'
    builder.run(
        f"python3 -m venv other; . other/bin/activate; {both}", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(CACHE / "wheels")
    )
    assert builder.run("other/bin/keyferry-agent --version").endswith(version)
    assert builder.run("other/bin/python -c 'import cryptography, prometheus_client'") == ""


def test_no_page_and_no_message_names_an_index_for_keyferry() -> None:
    """Another project can register a name that Keyferry has not registered."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md"), *ROOT.glob("*/keyferry*/**/*.py")]:
        if ".venv" not in path.parts:
            for line in path.read_text().splitlines():
                assert "pip install 'keyferry" not in line, path
                assert "pip install keyferry" not in line, path
