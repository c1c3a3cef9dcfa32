"""The test's side of a local agent: starts the agent, and sends commands to the relay in front of it."""

import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self

from ..client import Client
from ..errors import CODES, KeyferryError
from ..operations import OPERATIONS
from ..retry import Retry
from .places import AGENT_SOCKET, RELAY, SOCKET

if TYPE_CHECKING:
    from ..aio import Client as AsyncClient

__all__ = ["LocalAgent"]

_REPLY_TIMEOUT_SECONDS: Final = 60.0
"""Seconds to wait for the relay's reply. Starting the agent takes half a second, and a later command takes milliseconds."""


class LocalAgent:
    """A running agent with keys for `aliases`, each `alias/NAME` or `alias/NAME=KEY_SPEC`, and for alias/dev and alias/dev-sm4.

    The keys exist only in the agent's memory. `socket` is the path to connect to. Only one thread at a time may use this
    object; its clients may be used by any thread. Raises `KeyferryError` with the reason if the agent does not start.
    """

    def __init__(self, *aliases: str) -> None:
        if importlib.util.find_spec("keyferry_agent") is None:
            raise KeyferryError(
                "keyferry.testing runs a real agent, and the package keyferry-agent is not installed; "
                "install it beside keyferry (docs/installing.md)"
            )
        folder = tempfile.mkdtemp(prefix="keyferry-")
        self.socket = os.path.join(folder, SOCKET)
        self._direct = os.path.join(folder, AGENT_SOCKET)
        self._owner = os.getpid()
        try:
            self._relay = subprocess.Popen(  # noqa: S603 - this package's own module
                [sys.executable, "-P", "-m", RELAY, folder, *aliases],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the tests, which then close this agent
            )
        except BaseException:
            shutil.rmtree(folder)
            raise
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LocalAgent({self.socket!r})"

    def close(self) -> None:
        """Stop the agent, and remove its folder. In a forked child, only close the inherited descriptors."""
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.close()
        if os.getpid() == self._owner:
            try:
                self._relay.wait(_REPLY_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                self._relay.kill()
                self._relay.wait()
        self._relay.stdout.close()

    def client(self, *, timeout: float = 30.0, retry: Retry | None = None) -> Client:
        """Return a new client of this agent."""
        return Client(self.socket, timeout=timeout, retry=retry)

    def async_client(self, *, timeout: float = 30.0, retry: Retry | None = None) -> "AsyncClient":
        """Return a new client of this agent for trio and asyncio (extra `async`)."""
        from ..aio import Client as AsyncClient  # noqa: PLC0415 - needs anyio

        return AsyncClient(self.socket, timeout=timeout, retry=retry)

    def fail(self, code: str, *, operation: str | None = None, times: int | None = 1) -> None:
        """Refuse the next `times` requests of an operation (by default, of any) with a code of the agent.

        `times=None` refuses all requests until `reset`. "Rejected.Throttling" raises `Throttled`, and
        "ServiceUnavailableTemporary" raises `ServiceUnavailable`. Refused requests do not reach the agent. Faults apply in the
        order in which they were set. Raises ValueError for an unknown code or operation.
        """
        if code not in CODES:
            raise ValueError(f"{code!r} is not a code of the agent's; expected one of {', '.join(CODES)}")
        self._fault(code, operation, times)

    def lose_connection(self, *, operation: str | None = None, times: int | None = 1) -> None:
        """Close the connection, without an answer, at each of the next `times` requests. `times=None`: until `reset`.

        A client repeats the request on up to three new connections. So the application does not notice one loss, and with
        `times=None` calls raise `AgentUnavailable`. Raises ValueError for an operation that does not exist.
        """
        self._fault(None, operation, times)

    def disable_key(self, key_id: str) -> None:
        """Refuse the key like a disabled key, until `enable_key` or `reset`. `key_id` may be an alias.

        Raises `KeyferryError` for a key that does not exist.
        """
        with Client(self._direct) as kms:
            key = kms.describe_key(key_id=key_id).key_metadata
            aliases = kms.list_aliases(page_size=100).aliases.alias
        names = [key.key_id, *(alias.alias_name for alias in aliases if alias.key_id == key.key_id)]
        self._command("disable", key_id=key.key_id, version=key.primary_key_version, names=names)

    def enable_key(self, key_id: str) -> None:
        """Undo `disable_key`. Raises `KeyferryError` for a key that does not exist."""
        with Client(self._direct) as kms:
            self._command("enable", key_id=kms.describe_key(key_id=key_id).key_metadata.key_id)

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Remove the socket and close all connections for the time of a block, like an agent that is stopped."""
        self._command("listen", listen=False)
        try:
            yield
        finally:
            self._command("listen", listen=True)

    def reset(self) -> None:
        """Remove all faults, and enable all keys."""
        self._command("reset")

    def _fault(self, code: str | None, operation: str | None, times: int | None) -> None:
        if operation is not None and operation not in OPERATIONS:
            raise ValueError(f"{operation!r} is not an operation; expected one of {', '.join(OPERATIONS)}")
        if times is not None and times < 1:
            raise ValueError(f"times is {times}; expected at least 1, or None")
        self._command("fault", code=code, operation=operation, times=times)

    def _command(self, name: str, **arguments: Any) -> None:
        """Send a command to the relay, and wait for its reply. Raises `KeyferryError`."""
        assert self._relay.stdin is not None
        try:
            self._relay.stdin.write(json.dumps({"do": name, **arguments}).encode() + b"\n")
            self._relay.stdin.flush()
        except (OSError, ValueError):
            raise KeyferryError("the local agent has ended, or was closed") from None
        self._reply()

    def _reply(self) -> None:
        """Wait for one line of the relay. Raises `KeyferryError` for an error in it, and when the relay does not reply."""
        assert self._relay.stdout is not None
        readable, _, _ = select.select([self._relay.stdout], [], [], _REPLY_TIMEOUT_SECONDS)
        line = self._relay.stdout.readline() if readable else b""
        if not line:
            raise KeyferryError(
                "the local agent has ended"
                if readable
                else f"the local agent did not reply within {_REPLY_TIMEOUT_SECONDS:g} s"
            )
        reason = json.loads(line)
        if reason is not None:
            raise KeyferryError(f"the local agent does not start: {reason}")
