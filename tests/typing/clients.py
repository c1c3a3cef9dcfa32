"""Both clients for type checkers. Never run: mypy and pyright read it, and each missing complaint is one."""

from collections.abc import Coroutine
from typing import Any, assert_type

from keyferry import Client, aio, operations


def blocking(kms: Client, der: bytes) -> None:
    """Every method's parameters and results."""
    made = kms.generate_and_export_data_key(
        key_id="alias/a",
        public_key_blob=der,
        wrapping_key_spec="RSA_2048",
        wrapping_algorithm="RSAES_OAEP_SHA_256",
        number_of_bytes=32,
        encryption_context={"tenant": "acme"},
        dry_run=False,
    )
    assert_type(made, operations.GenerateAndExportDataKeyResult)
    assert_type(made.exported_data_key, str)
    assert_type(kms.generate_data_key(key_id="a").plaintext, str)
    assert_type(kms.list_keys(page_size=5).keys.key[0].key_arn, str)
    assert_type(kms.list_aliases().aliases.alias, tuple[operations.AliasListEntry, ...])
    assert_type(kms.describe_key(key_id="a").key_metadata.key_state, str)
    assert_type(kms.get_agent_status().counters, operations.Counters | None)
    assert_type(kms.re_encrypt(ciphertext_blob="", destination_key_id="a").destination_key_id, str)
    assert_type(kms.call("X", {}), dict[str, Any])
    kms.decrypt()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    kms.decrypt(ciphertext_blob=5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    kms.decrypt(ciphertext_blob="", encryption_contxt={})  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    kms.encrypt(key_id="a", plaintext=b"x")
    kms.encrypt(key_id="a", plaintext=5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    kms.list_keys(page_size="5")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    made.key_id = "x"  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


async def awaited(kms: aio.Client) -> None:
    """The same, as coroutines."""
    coroutine = kms.decrypt(ciphertext_blob=b"")
    task: Coroutine[Any, Any, operations.DecryptResult] = coroutine  # as asyncio.create_task wants it
    assert_type((await task).plaintext, str)
    assert_type(await kms.list_key_versions(key_id="a"), operations.ListKeyVersionsResult)
    await kms.encrypt(key_id="a")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
