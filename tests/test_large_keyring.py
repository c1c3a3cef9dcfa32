"""A keyring of 10,000 keys with 5 versions each: it loads, costs no more locked memory than its bytes, nor more per request."""

import os
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.keyring import serving
from support.keys import recipient

from keyferry import KmsError, operations
from keyferry.parameters import encode_base64
from keyferry.secret import SecretMemory, fill_random
from keyferry_agent import handlers
from keyferry_agent.authz.caller import Caller
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.settings import Settings
from keyferry_agent.keyring import edits, file
from keyferry_agent.keyring.document import Document, VersionEntry, new_id, now
from keyferry_agent.keyring.keyring import build_keyring, required_bytes
from keyferry_agent.keyring.sealing import new_identity
from keyferry_agent.peer import Peer
from keyferry_agent.state import ServerState

KEYS, VERSIONS = 10_000, 5
RSA = recipient("RSAES_OAEP_SHA_256")


def document(keys: int, recipients: list[str]) -> Document:
    """Return a keyring of alias/k0, alias/k1 and so on, with alternating key specs and five versions each."""
    made = Document(recipients)
    for number in range(keys):
        spec, size = (("Aliyun_AES_256", 32), ("Aliyun_SM4", 16))[number % 2]
        key = edits.create_key(made, key_spec=spec, alias=f"alias/k{number}")
        key.versions += [VersionEntry(new_id(), now(), bytearray(os.urandom(size))) for _ in range(VERSIONS - 1)]
    return made


def test_locked_memory_of_a_large_keyring_is_near_its_size(tmp_path: Path) -> None:
    """50,000 versions have 24 bytes of material each on average."""
    made = document(KEYS, [new_identity(tmp_path / "identity")])
    file.create(tmp_path / "keyring.age", made, None)
    with serving(tmp_path / "keyring.age", tmp_path / "agent.sock") as agent, agent.client() as kms:
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
        wanted = [
            operations.Encrypt(key_id=f"alias/k{number}", plaintext=encode_base64(str(number).encode()))
            for number in range(0, KEYS, 97)
        ]
        sealed = kms.pipeline(wanted)
        opened = kms.pipeline(operations.Decrypt(ciphertext_blob=each.ciphertext_blob) for each in sealed)
        assert kms.list_keys().total_count == kms.get_agent_status().keys == KEYS
        assert kms.list_key_versions(key_id="alias/k7").total_count == VERSIONS
    assert not [each for each in (*sealed, *opened) if isinstance(each, KmsError)]
    assert [each.plaintext for each in opened] == [each.plaintext for each in wanted]
    locked = re.search(r"VmLck:\s+(\d+) kB", status)
    assert locked is not None
    scratch = 40 * 1024
    material = sum(len(version.material) for key in made.keys for version in key.versions)
    assert material <= int(locked[1]) * 1024 <= 1.02 * material + scratch + 2 * 4096


def agent_with(keys: int) -> tuple[ServerState, Caller]:
    """An agent without a socket, and a caller who may do everything."""
    settings = Settings(memory="prefer", grants=(Grant("all", {"uid": 1}, ("kms:*",), ("*",)),))
    described = document(keys, []).describe()
    memory = SecretMemory(required_bytes(described), require=False)
    agent = ServerState(settings, build_keyring(described, fill_random, memory))
    caller = Caller(Peer(uid=1, gids=frozenset(), pid=1, listener="default"))
    caller.refresh(agent.policy)
    return agent, caller


def job_of(agent: ServerState, caller: Caller, name: str, params: dict[str, Any]) -> handlers.Job:
    """Return the job of a request that is allowed."""
    job = handlers.prepare(agent, caller, name, params).outcome
    assert isinstance(job, handlers.Job)
    return job


def work(agent: ServerState, caller: Caller, name: str, params: dict[str, Any]) -> int:
    """How many calls of functions one request takes."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def ask() -> None:
        job_of(agent, caller, name, params).run()

    ask()  # the decision cache is filled now
    sys.setprofile(profile)
    try:
        ask()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture(scope="module")
def small_and_large() -> list[tuple[ServerState, Caller]]:
    """The same agent with 10 keys and with 10,000."""
    return [agent_with(10), agent_with(KEYS)]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("GenerateAndExportDataKey", {"KeyId": "alias/k8", **RSA.params}),
        ("GenerateDataKey", {"KeyId": "alias/k8"}),
        ("GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/k8"}),
        ("Encrypt", {"KeyId": "alias/k8", "Plaintext": "AAAA"}),
        ("Decrypt", {}),
        ("ExportDataKey", RSA.params),
        ("ReEncrypt", {"DestinationKeyId": "alias/k9"}),
        ("DescribeKey", {"KeyId": "alias/k8"}),
        ("ListKeys", {}),
        ("ListAliases", {"PageNumber": 1}),
        ("ListKeyVersions", {"KeyId": "alias/k8"}),
        ("GetAgentStatus", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_steps_of_a_request_do_not_grow_with_the_keyring(
    small_and_large: list[tuple[ServerState, Caller]], name: str, params: dict[str, Any]
) -> None:
    """No request iterates over the keys."""
    steps = []
    for agent, caller in small_and_large:
        asked = dict(params)
        if name in ("Decrypt", "ExportDataKey", "ReEncrypt"):
            sealing = {"KeyId": "alias/k8", "Plaintext": "AAAA"}
            asked["CiphertextBlob"] = job_of(agent, caller, "Encrypt", sealing).run().ciphertext_blob
        steps.append(work(agent, caller, name, asked))
    assert steps[0] == steps[1] > 10
