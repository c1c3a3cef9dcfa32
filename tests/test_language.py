"""The check of the language rule, on diffs and on a repository."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.skip_unless import ROOT

SCRIPT = ROOT / "tools" / "language.py"


def check(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run the check in a folder."""
    return subprocess.run([sys.executable, SCRIPT, *words], cwd=folder, capture_output=True, text=True, check=False)


def git(folder: Path, *words: str) -> None:
    """Run git in a folder."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one page, which broke the rule before."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "page.md").write_text("Who asks is nobody.\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "a")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("Who asks waits.", "name the subject"),
        ("    # What is kept is wiped.", "name the subject"),
        ("It waits. Whatever comes is read.", "name the subject"),
        ("The lock is taken by somebody else.", "name the caller, the user, the task"),
        ("The file is no socket.", "negate the verb: is not a"),
        ("The key is not used any more.", "write: no longer"),
    ],
)
def test_changed_line_that_breaks_the_rule_is_named(repository: Path, line: str, advice: str) -> None:
    """The message has the file, the line's number and an advice."""
    with (repository / "page.md").open("a") as page:
        page.write(f"The agent waits.\n{line}\n")
    ended = check(repository)
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (1, f"page.md:3: {advice}: {line.strip()}")


def test_lines_that_did_not_change_are_not_judged(repository: Path) -> None:
    """The rule binds new text; the old text is rewritten where it is touched."""
    with (repository / "page.md").open("a") as page:
        page.write("What is a data key? The key is no longer used, and the file is not a socket.\n")
    assert (check(repository).returncode, check(repository).stdout) == (0, "")


def test_committed_lines_are_judged_from_a_base(repository: Path) -> None:
    """A branch is compared with the commit that it began at."""
    (repository / "page.md").write_text("Nobody waits.\n")
    git(repository, "commit", "--quiet", "--all", "--message", "b")
    assert check(repository).returncode == 0
    assert check(repository, "HEAD^").returncode == 1


def test_without_a_repository_the_check_passes_and_says_so(tmp_path: Path) -> None:
    """An unpacked archive has no history to compare with."""
    ended = check(tmp_path)
    assert (ended.returncode, "not in a git repository" in ended.stdout) == (0, True)
