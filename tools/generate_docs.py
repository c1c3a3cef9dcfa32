"""Generates parts of PROTOCOL.md and the shell completions from the declarations: `make docs`."""

import argparse
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shtab

from keyferry import command as keyferry_command
from keyferry.declaration import wire_name
from keyferry.errors import CODES
from keyferry.operations import OPERATIONS
from keyferry_agent.cli import main as agent_command

ROOT = Path(__file__).parents[1]
PROTOCOL = ROOT / "PROTOCOL.md"
PROGRAMS = ROOT / "tests" / "foreign" / "unwrap"
PROGRAMS_BY_TITLE = {
    "Java (17; nothing but the JDK)": "Unwrap.java",
    "Node (20; nothing but node)": "unwrap.mjs",
    "Go (standard library)": "unwrap.go",
    "Python (the `cryptography` package)": "unwrap.py",
    "OpenSSL's command line (3.0)": "unwrap.sh",
    ".NET (6 and later; **not run by any test**)": "Unwrap.cs",
}
SM2_PROGRAMS_BY_TITLE = {
    "Java (BouncyCastle 1.81)": "UnwrapSm2.java",
    "Go (github.com/emmansun/gmsm 0.15.5)": "sm2/unwrap_sm2.go",
    "Node (sm-crypto 0.3.13)": "unwrap_sm2.mjs",
    "OpenSSL's command line (3.0, built with SM2)": "unwrap_sm2.sh",
}
"""Programs of which PROTOCOL.md has excerpts, by the title there. tests/test_foreign_unwrap.py runs them."""
LANGUAGES = {".mjs": "javascript", ".cs": "csharp", ".py": "python"}
COMPLETIONS = {"client/completions": keyferry_command._parser, "agent/completions": agent_command._parser}


def operations() -> str:
    """Return the description, the parameters and the result of each operation."""
    lines: list[str] = []
    for operation in OPERATIONS.values():
        lines += [f"### {operation.name}", "", inspect.cleandoc(operation.doc), ""]
        if operation.parameters:
            lines += ["| parameter | | |", "|---|---|---|"]
            lines += [
                f"| `{name}` | {'required' if name in operation.required else ''} | {parameter.doc} |"
                for name, parameter in operation.parameters.items()
            ]
        else:
            lines += ["No parameters: the map is empty."]
        fields = ", ".join(f"`{wire_name(field)}`" for field in operation.result._fields)
        lines += ["", f"Result: {fields}.", ""]
    return "\n".join(lines)


def errors() -> str:
    """Return the table of error codes."""
    rows = [f"| `{code}` | {known.http_status} | {known.message.replace('{}', '…')} |" for code, known in CODES.items()]
    return "\n".join(["| Code | HttpStatus | Message begins with |", "|---|---|---|", *rows, ""])


def excerpt(name: str) -> str:
    """Return the part of a program between its marks."""
    marked = (PROGRAMS / name).read_text().split("[shown in PROTOCOL.md]\n")[1].split("[end]")[0]
    return textwrap.dedent(marked.rpartition("\n")[0]).strip("\n") + "\n"


def programs(titles: dict[str, str]) -> str:
    """Return a title and a code block for each program."""
    parts = []
    for title, name in titles.items():
        suffix = Path(name).suffix
        parts += [f"{title}:\n\n```{LANGUAGES.get(suffix, suffix[1:])}\n{excerpt(name)}```\n"]
    return "\n".join(parts)


def generated(text: str) -> str:
    """Return PROTOCOL.md's text with its generated parts renewed."""
    contents = {
        "operations": operations(),
        "errors": errors(),
        "unwrap": programs(PROGRAMS_BY_TITLE),
        "unwrap under SM2PKE": programs(SM2_PROGRAMS_BY_TITLE),
    }
    for name, content in contents.items():
        begin, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->\n"
        head, tail = text.split(begin)
        tail = tail.split(end)[1]
        text = f"{head}{begin}\n{content}\n{end}{tail}"
    return text


def completions() -> Iterator[tuple[Path, str]]:
    """Yield the completion file of each command for each shell, with its text."""
    for folder, new_parser in COMPLETIONS.items():
        parser = new_parser()
        _mark_for_completion(parser)
        for shell in ("bash", "zsh"):
            text = shtab.complete(parser, shell=shell)
            yield ROOT / folder / f"{parser.prog}.{shell}", "\n".join(map(str.rstrip, text.splitlines())) + "\n"


def _mark_for_completion(parser: argparse.ArgumentParser) -> None:
    """Mark the arguments that are files, and those whose parameter has a fixed set of values."""
    values = {f"--{p.name}": p.values for operation in OPERATIONS.values() for p in operation.parameters.values()}
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                _mark_for_completion(subparser)
        elif set(str(action.metavar).split("|")) & {"FILE", "PATH", "F", "IN", "OUT"}:
            completed: Any = action  # shtab reads this attribute
            completed.complete = shtab.FILE
        elif action.option_strings and values.get(action.option_strings[0]):
            action.choices = values[action.option_strings[0]]


if __name__ == "__main__":
    PROTOCOL.write_text(generated(PROTOCOL.read_text()))
    for path, text in completions():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
