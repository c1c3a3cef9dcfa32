"""The time of a refusal does not show which keys exist: paired rounds of one run, at any speed of the machine."""

import random
import time
from pathlib import Path

import pytest
from support.agent import RawConnection
from support.calls import error
from support.keyring import change, opened, serving

from keyferry.parameters import encode_base64
from keyferry.protocol import wire

ROUNDS = 60
PIPELINE = 150
LEAST = 8
"""Rounds of 60 in which one of two equal things is slower at least: fewer come once in a thousand million runs."""


def taken(connection: RawConnection, request: bytes) -> float:
    """Seconds until a pipeline of one request is answered."""
    data = request * PIPELINE
    before = time.perf_counter()
    connection.send(data)
    for _ in range(PIPELINE):
        assert error(connection.response())["Code"] == "Forbidden.NoPermission"
    return time.perf_counter() - before


PATTERNS = "".join(
    f'[[grant]]\nname="p{number}"\nto={{listener="default"}}\nactions=["kms:*"]\n'
    f'keys=["alias/p{number}-*-*", "alias/s*x{number}"]\n'
    for number in range(30)
)


@pytest.mark.parametrize(
    ("grants", "method"),
    [("", "DescribeKey"), (PATTERNS, "DescribeKey"), (PATTERNS, "GenerateDataKey"), ("", "Decrypt")],
    ids=["no grant", "30 grants with patterns", "GenerateDataKey", "no grant, a version"],
)
def test_refusal_time_does_not_depend_on_the_names_existence(
    keyring: Path, socket_path: Path, grants: str, method: str
) -> None:
    """Each round asks for both in random order, and each has to be the slower one often enough."""
    for number in range(4):
        change(keyring, "create-alias", f"alias/secret{number}", "alias/a")
    with serving(keyring, socket_path, to="uid=4207", more="") as agent:
        config = keyring.parent / "agent.toml"
        config.write_text(config.read_text() + grants)
        if grants:
            agent.wait_for("reload.done")
        with RawConnection(socket_path) as connection:
            pair = [wire.encode_request(1, method, params(method, exists, keyring)) for exists in (True, False)]
            chance = random.Random(method + grants)
            for request in pair * 3:
                taken(connection, request)
            slower = 0
            for _ in range(ROUNDS):
                order = chance.sample((0, 1), 2)
                times = dict(zip(order, [taken(connection, pair[which]) for which in order], strict=True))
                slower += times[0] > times[1]
    assert LEAST <= slower <= ROUNDS - LEAST


def params(method: str, exists: bool, keyring: Path) -> dict[str, str]:
    """Parameters that name a key, or a version, that there is or is not."""
    if method != "Decrypt":
        return {"KeyId": "alias/secret0" if exists else "alias/secret9"}
    version = opened(keyring).keys[0].versions[0].version_id if exists else "11111111-1111-4111-8111-111111111111"
    return {"CiphertextBlob": encode_base64(version.encode() + b"\x01" + bytes(32 + 32 + 32 + 16))}
