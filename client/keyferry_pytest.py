"""The pytest plugin of keyferry: the fixture `key_agent`, a real agent for the tests of an application.

    def test_an_order_is_encrypted(key_agent):
        assert Orders(Client()).encrypt(b"...")         # $KEYFERRY_SOCKET is the agent's socket

pytest imports this file in every run where keyferry is installed. So the file is not in the package, and imports the package
only at the first use of the fixture.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from keyferry.testing import LocalAgent


@pytest.fixture(scope="session")
def key_agent_aliases() -> Sequence[str]:
    """Return the aliases of `key_agent`, each `alias/NAME` or `alias/NAME=KEY_SPEC`. Override this fixture in conftest.py."""
    return ()


@pytest.fixture(scope="session")
def _key_agent(key_agent_aliases: Sequence[str]) -> "Iterator[LocalAgent]":
    from keyferry.testing import LocalAgent  # noqa: PLC0415 - only where it is used

    with LocalAgent(*key_agent_aliases) as agent:
        yield agent


@pytest.fixture
def key_agent(_key_agent: "LocalAgent", monkeypatch: pytest.MonkeyPatch) -> "Iterator[LocalAgent]":
    """Yield the session's `keyferry.testing.LocalAgent`, without faults at the start of each test.

    During the test, $KEYFERRY_SOCKET is the agent's socket.
    """
    monkeypatch.setenv("KEYFERRY_SOCKET", _key_agent.socket)
    yield _key_agent
    _key_agent.reset()
