"""The process between a test and its agent: starts the agent, forwards requests and answers, and answers with faults instead.

Commands arrive on standard input, one line of JSON each. The reply to each is one line on standard output: null, or the reason
why it failed. Standard input ends with the test's process; then the relay stops the agent and removes its folder.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ..errors import ProtocolError, kms_error
from ..parameters import MAX_PAGE, encode_base64
from ..protocol import wire
from .places import AGENT_SOCKET, SOCKET

__all__ = ["main"]

_LOG_NAME: Final = "agent.log"
_MAX_SHOWN_LOG: Final = 2_000
"""Characters from the end of the log in the message about an agent that does not start."""
_RECEIVE_BYTES: Final = 65_536
_CONNECT_STEP_SECONDS: Final = 0.005
"""Seconds between two attempts to connect to the starting agent."""
_STOP_GRACE_SECONDS: Final = 10.0
"""Seconds for the agent to end before it is killed."""
_ALLOWED_WHEN_DISABLED: Final = frozenset({"DescribeKey", "ListKeyVersions"})


@dataclass
class _Fault:
    code: str | None
    """None: the connection is closed."""
    operation: str | None
    times: int | None


class _Disabled(NamedTuple):
    """A key that the relay refuses like a disabled key."""

    names: frozenset[str]
    blob_prefix: str
    """The beginning, in Base64, of every CiphertextBlob of the key's only version."""

    def concerns(self, params: dict[str, Any]) -> bool:
        """Return whether a request is about this key."""
        request_keys = (str(params.get(name, "")) for name in ("KeyId", "DestinationKeyId"))
        # The last part of an ARN is key/ID or alias/NAME.
        in_names = any(name.rpartition(":")[2].removeprefix("key/") in self.names for name in request_keys)
        return in_names or _text(params.get("CiphertextBlob")).startswith(self.blob_prefix)


class _State:
    """The faults that are set, and the keys that are refused as disabled."""

    def __init__(self) -> None:
        self.faults: list[_Fault] = []
        self.disabled: dict[str, _Disabled] = {}

    def take(self, operation: str) -> _Fault | None:
        """Return the first fault that applies to a request of this operation, and count the request for the fault."""
        for fault in self.faults:
            if fault.operation in (None, operation):
                if fault.times is not None:
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                return fault
        return None

    def answer(self, request: wire.Request, response: wire.Response) -> wire.Response:
        """Return an answer of the agent, changed for disabled keys: a success is replaced by a refusal."""
        result, succeeds = response.result, (response.error or {}).get("Code") == "DryRunOperationError"
        metadata = (result or {}).get("KeyMetadata")
        if isinstance(metadata, dict) and metadata.get("KeyId") in self.disabled:
            return response._replace(result={**(result or {}), "KeyMetadata": {**metadata, "KeyState": "Disabled"}})
        if request.method in _ALLOWED_WHEN_DISABLED or not (result or succeeds):
            return response
        if any(key.concerns(request.params) for key in self.disabled.values()):
            return wire.Response(response.msgid, _error("Rejected.Disabled"), None)
        return response


def _text(blob: object) -> str:
    """Return a CiphertextBlob as Base64."""
    return encode_base64(blob) if isinstance(blob, bytes) else str(blob)


def _error(code: str) -> dict[str, Any]:
    """Return an error as the agent sends it."""
    error = kms_error(code, request_id=str(uuid.uuid4()).upper())
    return {
        "Code": error.code,
        "Message": error.message,
        "RequestId": error.request_id,
        "HttpStatus": error.http_status,
    }


class _Relay:
    """Connections of clients, each with its own connection to the agent."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, SOCKET)
        self._agent = os.path.join(folder, AGENT_SOCKET)
        self._state = _State()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def listen(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_unix_server(self._serve, self._path, backlog=1_024)

    def go_away(self) -> None:
        """Stop accepting connections, remove the socket, and close all connections."""
        if self._server is not None:
            self._server.close()
            with suppress(FileNotFoundError):
                os.unlink(self._path)
        for writer in self._writers:
            writer.transport.abort()

    async def do(self, command: dict[str, Any]) -> None:
        """Carry out one command of the test."""
        state, name = self._state, command.pop("do")
        if name == "fault":
            state.faults.append(_Fault(**command))
        elif name == "disable":
            prefix = encode_base64(command["version"].encode())
            state.disabled[command["key_id"]] = _Disabled(frozenset(command["names"]), prefix)
        elif name == "enable":
            state.disabled.pop(command["key_id"], None)
        elif name == "reset":
            self._state = _State()
        elif command["listen"]:
            await self.listen()
        else:
            self.go_away()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        # The agent may have ended. This process may be ending too, and then asyncio cancels all tasks.
        with suppress(OSError, asyncio.CancelledError):
            await self._forward(reader, writer)
        self._writers.discard(writer)
        writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward both ways, until either end has closed its connection."""
        requests: dict[int, wire.Request] = {}
        answers, agent = await asyncio.open_unix_connection(self._agent)
        pumps = [
            asyncio.create_task(self._requests(reader, writer, agent, requests)),
            asyncio.create_task(self._answers(answers, writer, requests)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            agent.close()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        agent: asyncio.StreamWriter,
        requests: dict[int, wire.Request],
    ) -> None:
        """Forward requests, or answer them with faults, until the client or a fault closes the connection."""
        decoder = wire.Decoder()
        while data := await reader.read(_RECEIVE_BYTES):
            decoder.feed(data)
            for message in decoder.messages():
                if not isinstance(message, wire.Request):
                    raise ProtocolError("a request is expected")
                fault = self._state.take(message.method)
                if fault is None:
                    requests[message.msgid] = message
                    agent.write(wire.encode_request(*message[:3]))
                    await agent.drain()
                elif fault.code is None:
                    return
                else:
                    writer.write(wire.encode_response(message.msgid, _error(fault.code), None))
                    await writer.drain()

    async def _answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: dict[int, wire.Request]
    ) -> None:
        """Forward answers, until the agent has closed the connection."""
        decoder = wire.Decoder(max_array=MAX_PAGE)
        while data := await reader.read(_RECEIVE_BYTES):
            decoder.feed(data)
            for message in decoder.messages():
                assert isinstance(message, wire.Response)
                request = None if message.msgid is None else requests.pop(message.msgid)
                writer.write(wire.encode_response(*(self._state.answer(request, message) if request else message)))
                await writer.drain()


async def _run(folder: str, agent: "subprocess.Popen[bytes]") -> None:
    failure = await _started(folder, agent)
    relay = _Relay(folder)
    if failure is None:
        await relay.listen()
    _reply(failure)
    if failure is not None:
        return
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        await relay.do(json.loads(line))
        _reply(None)
    relay.go_away()


async def _started(folder: str, agent: "subprocess.Popen[bytes]") -> str | None:
    """Wait until the agent accepts connections. Return None then, or the end of its log if the agent has ended."""
    while agent.poll() is None:
        with suppress(OSError):
            _, writer = await asyncio.open_unix_connection(os.path.join(folder, AGENT_SOCKET))
            writer.close()
            return None
        await asyncio.sleep(_CONNECT_STEP_SECONDS)
    return _end_of_log(folder) or f"it ended with exit code {agent.returncode}"


def _end_of_log(folder: str) -> str:
    with open(os.path.join(folder, _LOG_NAME), errors="replace") as log:
        return log.read()[-_MAX_SHOWN_LOG:].strip()


def _reply(failure: str | None) -> None:
    print(json.dumps(failure), flush=True)


def main(folder: str, *aliases: str) -> None:
    """Run an agent in a folder, and the relay in front of it, until standard input ends."""
    command = [sys.executable, "-P", "-m", "keyferry_agent", "run", "--dev"]
    options = [f"--socket={os.path.join(folder, AGENT_SOCKET)}", *(f"--alias={alias}" for alias in aliases)]
    try:
        with open(os.path.join(folder, _LOG_NAME), "wb") as log:
            agent = subprocess.Popen(  # noqa: S603 - the agent, with options of a test's own
                [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )
        try:
            with suppress(BrokenPipeError):  # the test's process has ended
                asyncio.run(_run(folder, agent))
        finally:
            agent.terminate()
            try:
                agent.wait(_STOP_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
