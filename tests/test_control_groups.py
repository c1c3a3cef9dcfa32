"""Names of control groups are their owner's to choose, in any bytes: real groups, and real processes in them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agent import RawConnection
from support.keyring import configuration, serving
from support.other_user import OTHER_USER, line_of, running_as
from support.skip_unless import root, unified_cgroups

from keyferry.protocol import wire

POD = "3f1d2a77-0b6e-4a0e-9f0a-2f7b6f0c1d22"
MOVE = """
with open({group!r} + b"/cgroup.procs", "w") as group:
    group.write(str(os.getpid()))
"""
CALL = """
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(bytes.fromhex(sys.argv[2]))
print(connection.recv(65536), flush=True)
sys.stdin.read()
"""
REQUEST = wire.encode_request(1, "DescribeKey", {"KeyId": "alias/a"})


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A control group as a service manager delegates one to a user, and all that was made below it."""
    top = unified_cgroups() / f"keyferry-test-{os.getpid()}"
    group = top / "user.slice" / "user-4207.slice" / "user@4207.service"
    group.mkdir(parents=True)
    yield group
    for folder, _, _ in os.walk(os.fsencode(top), topdown=False):
        os.rmdir(folder)


@pytest.mark.parametrize(
    "name",
    [
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"app.slice/\xc3\x28.service",
        b"\x01\x02\x1b[31m",
        "\N{LINE SEPARATOR}\N{NEXT LINE}".encode(),
        b"a\r0::/kubepods/besteffort/pod" + POD.encode() + b"/x",
        b"a\x0b0::/kubepods.slice/kubepods-pod" + POD.encode().replace(b"-", b"_") + b".slice/x",
        b"a\r1:name=systemd:/system.slice/orders.service",
        b"x" * 250 + b"/" + b"\xff" * 250,
    ],
    ids=[
        "not UTF-8",
        "surrogate",
        "below a slice",
        "control characters",
        "line separators",
        "pod",
        "pod, slice",
        "unit",
        "long",
    ],
)
@root()
def test_caller_in_an_oddly_named_control_group_has_no_unit(
    delegated: Path, keyring: Path, shared_socket: Path, name: bytes
) -> None:
    """The caller becomes neither a unit nor a pod of its choice, and other connections go on."""
    grants = "".join(
        f'[[grant]]\nname="{kind}"\nto={{{to}}}\nactions=["kms:*"]\nkeys=["*"]\n'
        for kind, to in (("pod", f'pod="{POD}"'), ("unit", 'unit="orders.service"'))
    )
    group = os.path.join(os.fsencode(delegated), name)
    os.makedirs(group)
    config = keyring.parent / "agent.toml"
    with serving(keyring, shared_socket, more='mode = "0666"') as agent, RawConnection(shared_socket) as honest:
        config.write_text(configuration(keyring, more='mode = "0666"') + grants)
        agent.wait_for("reload.done")
        for uid, answer in ((0, "KeyMetadata"), (OTHER_USER, "Forbidden.NoPermission")):
            with running_as(CALL, shared_socket, REQUEST.hex(), uid=uid, before=MOVE.format(group=group)) as caller:
                assert answer in line_of(caller)
                assert honest.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        assert agent.stop() == 0
