"""No function on the event loop calls a function that a caller's file system could block."""

import ast
from collections.abc import Iterator

from test_architecture import ALL, imports

BLOCKING = {"open", "stat", "lstat", "readlink", "realpath", "exists", "read_text", "read_bytes", "listdir", "scandir"}
"""Calls that a file system may keep from returning."""
MAY_BLOCK = {
    # Each reads files of the kernel or of the agent, whose names no peer chooses.
    ("keyferry_agent.peer.process", "cgroups"): {"open"},
    ("keyferry_agent.peer.credentials", "_overflow"): {"read_text"},
    ("keyferry_agent.peer.platform", "_control_groups_visible"): {"open"},
    ("keyferry_agent.server.server", "__init__"): {"open"},
    ("keyferry_agent.server.server", "_refuse_with_the_reserve"): {"open"},
}
IN_ANOTHER_PROCESS = ("keyferry_agent.peer.program", "keyferry_agent.peer.inspector")
ON_THE_LOOP = (
    "keyferry_agent.server.admission",
    "keyferry_agent.state",
    "keyferry_agent.server.dispatch",
    "keyferry_agent.server.line",
    "keyferry_agent.server.rounds",
    "keyferry_agent.server.connection",
    "keyferry_agent.crypto",
    "keyferry_agent.authz.grants",
    "keyferry_agent.handlers",
    "keyferry_agent.server.identity",
    "keyferry_agent.server.rate_limit",
    "keyferry_agent.peer",
    "keyferry_agent.authz.decision_cache",
    "keyferry_agent.server.server",
)
"""The modules whose functions run on the event loop while there are peers."""


def blocking_calls(name: str) -> Iterator[tuple[str, str]]:
    """Yield the functions of a module that call blocking functions, with those."""
    for function in ast.walk(ast.parse(ALL[name].read_text())):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in BLOCKING:
                    yield function.name, called


def test_event_loop_touches_no_file_of_a_peers_choice() -> None:
    """Only the module of programs reads such files, and only the inspector's process calls it."""
    found: dict[tuple[str, str], set[str]] = {}
    for name in ALL:
        if name.startswith(ON_THE_LOOP) and name not in IN_ANOTHER_PROCESS:
            for function, called in blocking_calls(name):
                found.setdefault((name, function), set()).add(called)
    assert found == MAY_BLOCK
    users = {name for name in ALL if "keyferry_agent.peer.program" in imports(name)}
    assert users == {"keyferry_agent.peer", "keyferry_agent.peer.inspection", "keyferry_agent.peer.inspector"}
    assert not [name for name in ALL if "keyferry_agent.peer.inspector" in imports(name)]
    assert {name for name, path in ALL.items() if name.startswith("keyferry_agent") and "/exe" in path.read_text()} <= {
        "keyferry_agent.peer.program",
        "keyferry_agent.authz.grants",
    }


def test_programs_are_inspected_in_another_process_only() -> None:
    """Only the inspector's process calls `inspect`."""
    callers = {
        (name, node.lineno)
        for name in ALL
        if name.startswith("keyferry_agent")
        for node in ast.walk(ast.parse(ALL[name].read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "inspect"
    }
    assert {name for name, _ in callers} == {"keyferry_agent.peer.inspector"}
    assert len(callers) == 1
