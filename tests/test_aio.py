"""The client for trio and asyncio: the same tests under both."""

import functools
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.agent import PATIENCE, RunningAgent, dev_agent
from support.fake_server import Part, respond_in_reverse, scripted_server, send_bytes
from support.keys import recipient

from keyferry import AgentUnavailable, InvalidRequest, NotFound, ProtocolError, Throttled, operations
from keyferry.aio import Client
from keyferry.parameters import decode_base64, encode_base64
from keyferry.protocol import wire
from keyferry.protocol.rpc import MAX_LOST_CONNECTIONS, Call, PendingCall

RSA = recipient("RSAES_OAEP_SHA_256")
SM2 = recipient("SM2PKE")


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """Run an async function in a fresh event loop of either kind."""
    return functools.partial(anyio.run, backend=request.param)


Run = Callable[[Callable[[], Awaitable[Any]]], Any]


def test_methods_match_the_blocking_client(agent: RunningAgent, run: Run) -> None:
    """The asynchronous methods are typed and take keyword arguments; `call` takes the API's names."""

    async def main() -> None:
        async with Client(agent.socket) as kms:
            made = await kms.generate_and_export_data_key(key_id="alias/dev", number_of_bytes=24, **RSA.arguments)
            opened = await kms.decrypt(ciphertext_blob=made.ciphertext_blob)
            assert decode_base64(opened.plaintext) == RSA.unwrap(made.exported_data_key)
            assert (await kms.call("GetAgentStatus", {}))["State"] == "Serving"
            assert repr(kms) == f"Client({str(agent.socket)!r})"
            with pytest.raises(NotFound):
                await kms.describe_key(key_id="alias/none")
            with pytest.raises(InvalidRequest, match="longer"):
                await kms.decrypt(ciphertext_blob="A" * 70_000)

    run(main)


def test_tasks_share_one_connection_concurrently(agent: RunningAgent, run: Run) -> None:
    """Each task gets its own answer, slow and fast ones mixed, over one connection."""
    sizes: dict[int, int] = {}

    async def main() -> int:
        async with Client(agent.socket) as kms:
            before = (await kms.get_agent_status()).counters

            async def one(size: int) -> None:
                to = SM2 if size % 10 == 0 else RSA
                made = await kms.generate_and_export_data_key(key_id="alias/dev", number_of_bytes=size, **to.arguments)
                sizes[size] = len(to.unwrap(made.exported_data_key))

            async with anyio.create_task_group() as tasks:
                for size in range(1, 101):
                    tasks.start_soon(one, size)
            after = (await kms.get_agent_status()).counters
            assert before is not None
            assert after is not None
            return after.connections_total - before.connections_total

    assert run(main) == 0
    assert sizes == {size: size for size in range(1, 101)}


def test_wrong_parameter_of_one_task_affects_no_other(agent: RunningAgent, run: Run) -> None:
    """The client does not send a request that would end the connection."""
    states: list[str] = []

    async def main() -> None:
        async with Client(agent.socket) as kms:

            async def good() -> None:
                states.append((await kms.get_agent_status()).state)

            async def wrong() -> None:
                with pytest.raises(InvalidRequest, match="float"):
                    await kms.call("Encrypt", {"KeyId": "alias/dev", "EncryptionContext": {"n": 1.5}})

            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(good)
                    tasks.start_soon(wrong)

    run(main)
    assert states == ["Serving"] * 10


def test_pipeline_returns_results_and_refusals_in_order(agent: RunningAgent, run: Run) -> None:
    """Results keep the order of the calls, also in a pipeline larger than every buffer on the way."""
    texts = [encode_base64(bytes([n % 256]) * 6_144) for n in range(100)]

    async def main() -> None:
        async with Client(agent.socket) as kms:
            sealed = await kms.pipeline(operations.Encrypt(key_id="alias/dev", plaintext=text) for text in texts)
            opened = await kms.pipeline(operations.Decrypt(ciphertext_blob=each.ciphertext_blob) for each in sealed)
            assert [each.plaintext for each in opened] == texts
            wanted = [("DescribeKey", {"KeyId": "alias/none"}), operations.GetAgentStatus()]
            refused, answered = await kms.pipeline(wanted)
            assert isinstance(refused, NotFound)
            assert answered.state == "Serving"

    run(main)


def test_many_tasks_with_pipelines_do_not_stall_their_connection(agent: RunningAgent, run: Run) -> None:
    """One task always reads, however much the others send."""

    async def main() -> list[int]:
        lengths: list[int] = []
        async with Client(agent.socket, timeout=PATIENCE) as kms:

            async def one() -> None:
                lengths.append(len(await kms.pipeline([operations.GetAgentStatus()] * 1_500)))

            async with anyio.create_task_group() as tasks:
                for _ in range(12):
                    tasks.start_soon(one)
        return lengths

    assert run(main) == [1_500] * 12


def test_deadline_during_the_arrival_of_an_answer_is_a_timeout(socket_path: Path, run: Run) -> None:
    """A call raises the library's own error if other work blocked the event loop past its deadline."""

    async def main() -> None:
        async with Client(socket_path, timeout=0.3) as kms:

            async def busy() -> None:
                await anyio.sleep(0.1)
                answer.set()
                time.sleep(0.5)  # noqa: ASYNC251 - on purpose

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(busy)
                with pytest.raises(AgentUnavailable, match=r"within 0\.3 s"):
                    await kms.pipeline([("A", {}), ("B", {})])

    answer = threading.Event()

    def part(connection: socket.socket) -> None:
        connection.recv(65_536)
        answer.wait(PATIENCE)
        connection.sendall(wire.encode_response(1, None, {"RequestId": "A"}))
        connection.recv(65_536)

    with scripted_server(socket_path, part):
        run(main)


def test_client_is_reusable_after_close_and_agent_restart(socket_path: Path, run: Run) -> None:
    """A closed client, and one whose agent restarted, reconnects by itself."""

    async def main() -> None:
        async with Client(socket_path) as kms:
            with dev_agent(socket_path):
                first = (await kms.get_agent_status()).started_at
                await kms.aclose()
                assert (await kms.get_agent_status()).started_at == first
            with pytest.raises(AgentUnavailable, match="does not exist"):
                await kms.get_agent_status()
            with dev_agent(socket_path):
                assert (await kms.get_agent_status()).state == "Serving"

    run(main)


def test_an_agent_that_does_not_answer_in_time_is_unavailable(socket_path: Path, run: Run) -> None:
    """A call without an answer in time raises AgentUnavailable, and the next call succeeds."""

    async def main() -> None:
        with dev_agent(socket_path) as stopped:
            stopped.signal(signal.SIGSTOP)
            async with Client(socket_path, timeout=0.1) as hasty:
                with pytest.raises(AgentUnavailable, match=r"within 0\.1 s"):
                    await hasty.get_agent_status()
                stopped.signal(signal.SIGCONT)
                hasty._timeout = PATIENCE
                assert (await hasty.get_agent_status()).state == "Serving"

    run(main)


def test_a_cancelled_call_leaves_the_others_their_answers(socket_path: Path, run: Run) -> None:
    """Other calls get their answers, even if the cancelled task was the one that read."""

    async def main() -> None:
        with dev_agent(socket_path) as agent:
            async with Client(socket_path, timeout=PATIENCE) as kms:
                await kms.get_agent_status()
                agent.signal(signal.SIGSTOP)
                states = []

                async def ask() -> None:
                    states.append((await kms.get_agent_status()).state)

                async with anyio.create_task_group() as tasks:
                    with anyio.CancelScope() as scope:
                        async with anyio.create_task_group() as doomed:
                            doomed.start_soon(kms.get_agent_status)  # it asks first, and so it reads
                            await anyio.wait_all_tasks_blocked()
                            for _ in range(5):
                                tasks.start_soon(ask)
                            await anyio.wait_all_tasks_blocked()
                            scope.cancel()
                    agent.signal(signal.SIGCONT)
                assert states == ["Serving"] * 5
                assert (await kms.get_agent_status()).state == "Serving"

    run(main)


def test_call_cancelled_while_sending_costs_no_other_answer(socket_path: Path, run: Run) -> None:
    """After half a request was sent, the other tasks repeat their requests on a new connection."""
    given_up = threading.Event()

    def deaf(_connection: socket.socket) -> None:
        given_up.wait(PATIENCE)

    async def main() -> None:
        async with Client(socket_path, timeout=PATIENCE) as kms:
            answered = []

            async def patient() -> None:
                answered.append(await kms.call("Status", {}))

            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as doomed:
                        # More than a socket takes without a reader: it is cut off in the middle.
                        wanted = [PendingCall.of(Call("Big", {"Value": "x" * 60_000})) for _ in range(40)]
                        connection = await kms._connected()
                        chunks = connection.session.chunks(wanted)

                        async def flood() -> None:
                            for chunk in chunks:
                                await connection.send(chunk)

                        doomed.start_soon(flood)
                        await anyio.wait_all_tasks_blocked()
                        tasks.start_soon(patient)
                        await anyio.wait_all_tasks_blocked()
                        scope.cancel()
                given_up.set()
            assert answered == [{"RequestId": "Status"}]

    with scripted_server(socket_path, deaf, respond_in_reverse(1)):
        run(main)


def test_closing_ends_the_calls_that_are_under_way(socket_path: Path, run: Run) -> None:
    """Calls in flight raise an error that names the close, and are not repeated."""

    def silent(connection: socket.socket) -> None:
        while connection.recv(65_536):
            pass

    async def main() -> None:
        async with Client(socket_path, timeout=PATIENCE) as kms:

            async def ask() -> None:
                with pytest.raises(AgentUnavailable, match="closed"):
                    await kms.get_agent_status()

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                await kms.aclose()

    with scripted_server(socket_path, silent):
        run(main)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ((send_bytes(b"\xc1"),), ProtocolError),
        ((send_bytes(b""),) * MAX_LOST_CONNECTIONS, AgentUnavailable),
        ((send_bytes(wire.encode_response(99, None, {})),), ProtocolError),
        (
            (
                send_bytes(
                    wire.encode_response(None, {"Code": "Rejected.Throttling", "Message": "m", "HttpStatus": 429}, None)
                ),
            ),
            Throttled,
        ),
    ],
)
def test_errors_are_those_of_the_blocking_client(
    socket_path: Path, run: Run, script: tuple[Part, ...], error: type[Exception]
) -> None:
    """Exceptions are plain ones, not groups, and the next call succeeds."""

    async def main() -> None:
        async with Client(socket_path, timeout=5) as kms:
            with pytest.raises(error):
                await kms.call("First", {})
            assert await kms.call("Second", {}) == {"RequestId": "Second"}

    with scripted_server(socket_path, *script, respond_in_reverse(1)):
        run(main)


def test_client_waits_for_a_full_connection_queue(socket_path: Path, run: Run) -> None:
    """An agent with a full queue is busy, not absent."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(socket_path))
        listening.listen(0)

        async def main() -> None:
            full = []
            try:
                while True:
                    full.append(socket.socket(socket.AF_UNIX))
                    full[-1].setblocking(False)
                    full[-1].connect(str(socket_path))
            except BlockingIOError:
                pass
            async with Client(socket_path, timeout=0.05) as kms:
                with pytest.raises(AgentUnavailable, match="within"):
                    await kms.get_agent_status()
            for each in full:
                each.close()

        run(main)
