"""Check the language rule of CONTRIBUTING.md on added and changed lines: `python tools/language.py [BASE]`.

BASE is a commit; the default is the branch that this one goes into, or the last commit where there is no such branch.
Exits 1, and prints each line, if a line breaks the rule.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

_PROSE: Final = (
    "*.py",
    "*.md",
    "*.toml",
    "*.service",
    "*.socket",
    "*.yaml",
    ":!tools/language.py",
    ":!tests/test_language.py",
)
_RULES: Final = (
    (
        re.compile(r"""(?:^[\s#"*>|-]*|[.:;!] )(?:Who|Whoever|What|Whatever|Nobody|Somebody|Everybody) (?!.*\?)"""),
        "name the subject",
    ),
    (re.compile(r"\b(?:nobody|somebody|everybody|whoever)\b", re.IGNORECASE), "name the caller, the user, the task"),
    (re.compile(r"\bis (?:no|none)\b(?! longer\b)"), "negate the verb: is not a"),
    (re.compile(r"\bany more\b"), "write: no longer"),
)
_HUNK: Final = re.compile(r"^@@ -\S+ \+(\d+)")


def added(diff: str) -> Iterator[tuple[str, int, str]]:
    """Yield file, line number and text of each line that a diff without context adds."""
    path, number = "", 0
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ ").removeprefix("b/")
        elif hunk := _HUNK.match(line):
            number = int(hunk[1])
        elif line.startswith("+"):
            yield path, number, line[1:]
            number += 1


def complaints(diff: str) -> list[str]:
    """Return a message for each added line that breaks the rule."""
    return [
        f"{path}:{number}: {advice}: {text.strip()}"
        for path, number, text in added(diff)
        for pattern, advice in _RULES
        if pattern.search(text)
    ]


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def _base() -> str:
    for branch in ("@{upstream}", "origin/main"):
        found = subprocess.run(["git", "merge-base", "HEAD", branch], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    return "HEAD"


def main(words: list[str]) -> int:
    """Check what differs from BASE, uncommitted changes included."""
    if subprocess.run(["git", "rev-parse"], capture_output=True, check=False).returncode:
        print("not in a git repository: the language of changed lines is not checked")
        return 0
    base = words[0] if words else _base()
    found = complaints(_git("diff", "-U0", "--no-color", "--no-ext-diff", "--diff-filter=d", base, "--", *_PROSE))
    for line in found:
        print(line)
    if found:
        print(f"{len(found)} lines break the language rule of CONTRIBUTING.md.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
