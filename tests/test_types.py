"""The client's types, as the type checkers of its users see them."""

import subprocess
import sys
from importlib.resources import files

from support.agent import PATIENCE
from support.skip_unless import NODE_MODULES, ROOT, node_module

FOLDER = ROOT / "tests" / "typing"


@node_module("pyright")
def test_pyright_sees_every_methods_parameters_and_results() -> None:
    """In strict mode, pyright reports exactly the expected errors. mypy reads the same file in `make check`."""
    ended = subprocess.run(
        [
            NODE_MODULES / ".bin" / "pyright",
            *("--project", FOLDER / "pyrightconfig.json"),
            *("--pythonpath", sys.executable),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def test_both_distributions_are_marked_as_typed() -> None:
    """The marker is the py.typed of PEP 561."""
    for package in ("keyferry", "keyferry_agent"):
        assert files(package).joinpath("py.typed").is_file()
