"""Rotation over several hosts that get their copies of the keyring at different times."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.agent import RunningAgent
from support.keyring import WATCHFUL, Command, serving

from keyferry import Client, KmsError, NotFound, operations
from keyferry.parameters import encode_base64


class Host:
    """An agent with its own copy of the keyring, which the test distributes."""

    def __init__(self, folder: Path, master: Path) -> None:
        self.keyring = folder / "keyring.age"
        folder.mkdir()
        shutil.copy(master.parent / "identity", folder / "identity")
        shutil.copy(master, self.keyring)
        self._master = master
        self._reloads = 0
        self.agent: RunningAgent = serving(self.keyring, folder / "agent.sock", command=WATCHFUL)

    def distribute(self) -> None:
        """Give it the master copy, as deployment tools do, and wait until it has taken it up."""
        beside = self.keyring.with_name("beside")
        shutil.copy(self._master, beside)
        beside.replace(self.keyring)
        self._reloads += 1
        self.agent.wait_for("reload.done", count=self._reloads)


@pytest.fixture
def hosts(tmp_path: Path, keyring: Path) -> Iterator[list[Host]]:
    """Two hosts with the same keyring."""
    with ExitStack() as stack:
        made = [Host(tmp_path / name, keyring) for name in ("east", "west")]
        for host in made:
            stack.enter_context(host.agent)
        yield made


@contextmanager
def traffic(hosts: list[Host]) -> Iterator[list[KmsError]]:
    """Encrypt and decrypt on each host until the end of the block; yield the refusals."""
    refusals: list[KmsError] = []
    done = threading.Event()

    def work(here: Client, there: Client) -> None:
        while not done.is_set():
            sealed = here.pipeline([operations.Encrypt(key_id="alias/a", plaintext=encode_base64(b"secret"))] * 20)
            opened = there.pipeline(operations.Decrypt(ciphertext_blob=each.ciphertext_blob) for each in sealed)
            refusals.extend(each for each in opened if isinstance(each, KmsError))

    with ExitStack() as stack:
        workers = [
            threading.Thread(
                target=work,
                args=[stack.enter_context(host.agent.client()) for host in (here, there)],
            )
            for here in hosts
            for there in hosts
        ]
        for worker in workers:
            worker.start()
        try:
            yield refusals
        finally:
            done.set()
            for worker in workers:
                worker.join()


@pytest.mark.parametrize("order", [(0, 1, 0, 1), (0, 1, 1, 0)])
def test_no_decrypt_fails_during_a_staged_rotation(
    hosts: list[Host], keyring_json: Command, order: tuple[int, ...]
) -> None:
    """The hosts get the copies in any order: each host decrypts ciphertexts of the other at every step."""
    with traffic(hosts) as refusals:
        staged = keyring_json("rotate", "alias/a", "--stage")["KeyVersion"]["KeyVersionId"]
        for number in order[:2]:
            hosts[number].distribute()
        keyring_json("promote", "alias/a", staged)
        for number in order[2:]:
            hosts[number].distribute()
    assert not refusals
    for host in hosts:
        with host.agent.client() as kms:
            assert kms.describe_key(key_id="alias/a").key_metadata.primary_key_version == staged


def test_staged_version_decrypts_and_does_not_encrypt(hosts: list[Host], keyring_json: Command) -> None:
    """A staged version may therefore reach the hosts at any time before its promotion."""
    before = keyring_json("show", "alias/a")["KeyMetadata"]["PrimaryKeyVersion"]
    staged = keyring_json("rotate", "alias/a", "--stage")["KeyVersion"]["KeyVersionId"]
    hosts[0].distribute()
    hosts[1].distribute()
    with hosts[0].agent.client() as here, hosts[1].agent.client() as there:
        assert here.generate_data_key(key_id="alias/a").key_version_id == before
        keyring_json("promote", "alias/a", staged)
        hosts[0].distribute()
        made = here.generate_data_key(key_id="alias/a")
        assert made.key_version_id == staged
        assert there.generate_data_key(key_id="alias/a").key_version_id == before
        assert there.decrypt(ciphertext_blob=made.ciphertext_blob).plaintext == made.plaintext


def test_unstaged_rotation_fails_on_the_slower_host(hosts: list[Host], keyring_json: Command) -> None:
    """Ciphertexts of the host that rotated first do not open on the other, which is the reason for staging."""
    keyring_json("rotate", "alias/a")
    hosts[0].distribute()
    with hosts[0].agent.client() as here, hosts[1].agent.client() as there:
        made = here.generate_data_key(key_id="alias/a")
        with pytest.raises(NotFound, match="KeyVersionNotFound"):
            there.decrypt(ciphertext_blob=made.ciphertext_blob)
        hosts[1].distribute()
        assert there.decrypt(ciphertext_blob=made.ciphertext_blob).plaintext == made.plaintext
