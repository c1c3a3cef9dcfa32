"""docs/how-to/use-the-alibaba-sdk.md: each code block is run, and calls a real gateway over https with the unmodified SDK.

The blocks in Java and Go are run by tests/system/test_compiled_sdks.py.
"""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest
from support import sdk_page
from support.agent import PATIENCE
from support.gateway import Prepared, prepare, serving_gateway
from support.keyring import change
from support.sdk import NODE_MODULES, PYTHON, SCRIPTS, python_sdks
from support.skip_unless import ROOT
from support.small_oss import SmallOss, small_oss

NODE = next(kind for kind in SCRIPTS if kind.name == "node-kms20160120")
IN_PYTHON, IN_NODE = sdk_page.blocks("python"), sdk_page.blocks("js")
node_sdks = pytest.mark.skipif(bool(NODE.missing), reason=str(NODE.missing))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """An agent whose keyring has the key of the page."""
    gateway = prepare(tmp_path_factory.mktemp("page"))
    change(gateway.keyring, "create-key", "--alias", "alias/orders")
    with serving_gateway(gateway):
        yield gateway


@pytest.fixture(scope="module")
def storage() -> Iterator[SmallOss]:
    """An object storage."""
    with small_oss() as server:
        yield server


def printed(command: list[str], code: str, prepared: Prepared, **more: str) -> str:
    """Return the output of a program that reads a code block from its standard input."""
    done = subprocess.run(
        command,
        input=sdk_page.on(code, prepared),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, **sdk_page.environment(prepared), **more},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@python_sdks()
@pytest.mark.parametrize("number", range(len(IN_PYTHON)))
def test_a_block_in_python_is_a_whole_program(prepared: Prepared, storage: SmallOss, number: int) -> None:
    """It decrypts what it has made, with the SDK as it is installed."""
    oss = {"OSS_ENDPOINT": storage.endpoint, "OSS_ACCESS_KEY_ID": "of OSS", "OSS_ACCESS_KEY_SECRET": "of OSS"}
    assert printed([str(PYTHON), "-W", "ignore", "-"], IN_PYTHON[number], prepared, **oss) == "True"


@node_sdks
@pytest.mark.parametrize("number", range(len(IN_NODE)))
def test_a_block_in_javascript_is_a_whole_program(prepared: Prepared, number: int) -> None:
    """It decrypts what it has made, with the SDK as it is installed."""
    assert printed(["node", "-"], IN_NODE[number], prepared, NODE_PATH=str(NODE_MODULES)) == "true"


def test_each_block_of_the_page_is_run_by_a_test() -> None:
    """The page has blocks in no other language than those of the tests."""
    assert sdk_page.languages() == {"sh", "python", "js", "java", "go"}
    counts = {language: len(sdk_page.blocks(language)) for language in sdk_page.languages()}
    assert counts == {"sh": 1, "python": 4, "js": 3, "java": 1, "go": 1}


def test_the_page_names_the_packages_that_are_tested() -> None:
    """Each package that the page installs is one that .ci/sdks installs."""
    page = sdk_page.PAGE.read_text("utf-8")
    listed = re.findall(r"`(?:pip|npm) install ([^`]+)`", page)
    names = {name for words in listed for name in words.split()}
    tested = (ROOT / ".ci" / "sdks").read_text() + (ROOT / "tests/foreign/sdk/requirements.in").read_text()
    assert {name for name in names if name.replace("_", "-") not in tested} == set()
    assert len(names) >= 7
