"""Writes the generated parts of PROTOCOL.md from the declarations: `python tests/support/reference.py` (make docs)."""

from pathlib import Path

from keyferry.declaration import wire_name
from keyferry.errors import CODES
from keyferry.operations import OPERATIONS

PROTOCOL = Path(__file__).parents[2] / "PROTOCOL.md"


def operations() -> str:
    """For each operation: what it does, its parameters, its result."""
    lines: list[str] = []
    for operation in OPERATIONS.values():
        lines += [f"### {operation.name}", "", operation.doc, ""]
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
    """The table of codes."""
    rows = [f"| `{code}` | {known.http_status} | {known.message.replace('{}', '…')} |" for code, known in CODES.items()]
    return "\n".join(["| Code | HttpStatus | Message begins with |", "|---|---|---|", *rows, ""])


def generated(text: str) -> str:
    """PROTOCOL.md's text with its generated parts as they should be."""
    for name, content in (("operations", operations()), ("errors", errors())):
        begin, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->\n"
        head, rest = text.split(begin)
        tail = rest.split(end)[1]
        text = f"{head}{begin}\n{content}\n{end}{tail}"
    return text


if __name__ == "__main__":
    PROTOCOL.write_text(generated(PROTOCOL.read_text()))
