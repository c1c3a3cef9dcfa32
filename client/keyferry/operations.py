"""Every operation of the API, declared once.

The agent's checks, the clients' methods with their types, `keyferry call --help`, shell completion and the tables in
PROTOCOL.md are all derived from these declarations.

To add an operation: declare its request and its result, add a line to `Operations`, and a handler to the agent's `handlers`.
`declaration` defines requests and results.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .declaration import Operation
from .parameters import (
    CiphertextBlob,
    DestinationEncryptionContext,
    DestinationKeyId,
    DryRun,
    EncryptionContext,
    KeyId,
    KeySpec,
    NumberOfBytes,
    PageNumber,
    PageSize,
    Plaintext,
    PublicKeyBlob,
    SourceEncryptionContext,
    WrappingAlgorithm,
    WrappingKeySpec,
)

__all__ = ["OPERATIONS", "Operations"]

# --- GenerateAndExportDataKey -----------------------------------------------------------------------------------------


class GenerateAndExportDataKey(NamedTuple):
    """Make a data key; return it encrypted under the master key, and under a module's public key. Never in plaintext."""

    key_id: KeyId
    public_key_blob: PublicKeyBlob
    wrapping_key_spec: WrappingKeySpec
    wrapping_algorithm: WrappingAlgorithm
    key_spec: KeySpec = None
    number_of_bytes: NumberOfBytes = None
    encryption_context: EncryptionContext = None
    dry_run: DryRun = False


class GenerateAndExportDataKeyResult(NamedTuple):
    key_id: str
    key_version_id: str
    ciphertext_blob: str
    exported_data_key: str
    request_id: str = ""


# --- ExportDataKey ----------------------------------------------------------------------------------------------------


class ExportDataKey(NamedTuple):
    """Open a CiphertextBlob and return its data key encrypted under a module's public key. Never in plaintext."""

    ciphertext_blob: CiphertextBlob
    public_key_blob: PublicKeyBlob
    wrapping_key_spec: WrappingKeySpec
    wrapping_algorithm: WrappingAlgorithm
    encryption_context: EncryptionContext = None
    dry_run: DryRun = False


class ExportDataKeyResult(NamedTuple):
    key_id: str
    key_version_id: str
    exported_data_key: str
    request_id: str = ""


# --- GenerateDataKey --------------------------------------------------------------------------------------------------


class GenerateDataKey(NamedTuple):
    """Make a data key; return it encrypted under the master key, and in plaintext."""

    key_id: KeyId
    key_spec: KeySpec = None
    number_of_bytes: NumberOfBytes = None
    encryption_context: EncryptionContext = None
    dry_run: DryRun = False


class GenerateDataKeyResult(NamedTuple):
    key_id: str
    key_version_id: str
    ciphertext_blob: str
    plaintext: str
    request_id: str = ""

    def __repr__(self) -> str:
        return _without_plaintext(self)


# --- GenerateDataKeyWithoutPlaintext ----------------------------------------------------------------------------------


class GenerateDataKeyWithoutPlaintext(NamedTuple):
    """Make a data key; return it encrypted under the master key only, for another client to open later."""

    key_id: KeyId
    key_spec: KeySpec = None
    number_of_bytes: NumberOfBytes = None
    encryption_context: EncryptionContext = None
    dry_run: DryRun = False


class GenerateDataKeyWithoutPlaintextResult(NamedTuple):
    key_id: str
    key_version_id: str
    ciphertext_blob: str
    request_id: str = ""


# --- Encrypt ----------------------------------------------------------------------------------------------------------


class Encrypt(NamedTuple):
    """Encrypt a few bytes, such as a password or a key, under the master key."""

    key_id: KeyId
    plaintext: Plaintext
    encryption_context: EncryptionContext = None
    dry_run: DryRun = False

    def __repr__(self) -> str:
        return _without_plaintext(self)


class EncryptResult(NamedTuple):
    key_id: str
    key_version_id: str
    ciphertext_blob: str
    request_id: str = ""


# --- Decrypt ----------------------------------------------------------------------------------------------------------


class Decrypt(NamedTuple):
    """Open a CiphertextBlob and return its plaintext."""

    ciphertext_blob: CiphertextBlob
    encryption_context: EncryptionContext = None
    dry_run: DryRun = False


class DecryptResult(NamedTuple):
    key_id: str
    key_version_id: str
    plaintext: str
    request_id: str = ""

    def __repr__(self) -> str:
        return _without_plaintext(self)


# --- ReEncrypt --------------------------------------------------------------------------------------------------------


class ReEncrypt(NamedTuple):
    """Open a CiphertextBlob and encrypt its plaintext under another key, or the same key's primary version.

    Needs `kms:ReEncryptFrom` on the key that opens it, and `kms:ReEncryptTo` on the destination.
    """

    ciphertext_blob: CiphertextBlob
    destination_key_id: DestinationKeyId
    source_encryption_context: SourceEncryptionContext = None
    destination_encryption_context: DestinationEncryptionContext = None
    dry_run: DryRun = False


class ReEncryptResult(NamedTuple):
    key_id: str
    key_version_id: str
    destination_key_id: str
    destination_key_version_id: str
    ciphertext_blob: str
    request_id: str = ""


# --- DescribeKey ------------------------------------------------------------------------------------------------------


class DescribeKey(NamedTuple):
    """Return the description and the state of a master key."""

    key_id: KeyId


class KeyMetadata(NamedTuple):
    key_id: str
    arn: str
    description: str
    key_spec: str
    key_usage: str
    key_state: str
    origin: str
    protection_level: str
    creator: str
    creation_date: str
    primary_key_version: str
    last_rotation_date: str
    automatic_rotation: str
    deletion_protection: str
    delete_date: str
    material_expire_time: str


class DescribeKeyResult(NamedTuple):
    key_metadata: KeyMetadata
    request_id: str = ""


# --- ListKeys ---------------------------------------------------------------------------------------------------------


class ListKeys(NamedTuple):
    """List the master keys that the caller has a grant on, a page at a time."""

    page_number: PageNumber = None
    page_size: PageSize = None


class KeyListEntry(NamedTuple):
    key_id: str
    key_arn: str


class KeyList(NamedTuple):
    key: tuple[KeyListEntry, ...]


class ListKeysResult(NamedTuple):
    keys: KeyList
    total_count: int
    page_number: int
    page_size: int
    request_id: str = ""


# --- ListKeyVersions --------------------------------------------------------------------------------------------------


class ListKeyVersions(NamedTuple):
    """List the versions of a master key, staged ones included, in the order they were made."""

    key_id: KeyId
    page_number: PageNumber = None
    page_size: PageSize = None


class KeyVersionListEntry(NamedTuple):
    key_id: str
    key_version_id: str
    creation_date: str


class KeyVersionList(NamedTuple):
    key_version: tuple[KeyVersionListEntry, ...]


class ListKeyVersionsResult(NamedTuple):
    key_versions: KeyVersionList
    total_count: int
    page_number: int
    page_size: int
    request_id: str = ""


# --- ListAliases ------------------------------------------------------------------------------------------------------


class ListAliases(NamedTuple):
    """List the aliases of the master keys that the caller has a grant on, a page at a time."""

    page_number: PageNumber = None
    page_size: PageSize = None


class AliasListEntry(NamedTuple):
    key_id: str
    alias_name: str
    alias_arn: str


class AliasList(NamedTuple):
    alias: tuple[AliasListEntry, ...]


class ListAliasesResult(NamedTuple):
    aliases: AliasList
    total_count: int
    page_number: int
    page_size: int
    request_id: str = ""


# --- GetAgentStatus ---------------------------------------------------------------------------------------------------


class GetAgentStatus(NamedTuple):
    """Return the state of the agent. Needs no grant; with kms:GetAgentStatus, also counters of connections and requests."""


class Counters(NamedTuple):
    connections: int
    connections_total: int
    requests_total: int
    requests_refused: int


class Condition(NamedTuple):
    name: str
    message: str


class GetAgentStatusResult(NamedTuple):
    version: str
    protocol_version: int
    state: str
    started_at: str
    keys: int
    keyring_loaded_at: str
    memory_protection: str
    counters: Counters | None = None
    ready: bool | None = None
    keyring_source: str | None = None
    conditions: tuple[Condition, ...] = ()
    request_id: str = ""


# --- GetAgentHealth ---------------------------------------------------------------------------------------------------


class GetAgentHealth(NamedTuple):
    """Return whether the agent answers calls, and why not. For probes: it needs no grant, and has no audit entry."""


class GetAgentHealthResult(NamedTuple):
    state: str
    ready: bool
    conditions: tuple[Condition, ...]
    request_id: str = ""


# --- the table --------------------------------------------------------------------------------------------------------


class Operations:
    """Every operation, as a method of the classes that inherit this one: `Client` and `aio.Client`."""

    generate_and_export_data_key = Operation(GenerateAndExportDataKey, GenerateAndExportDataKeyResult)
    export_data_key = Operation(ExportDataKey, ExportDataKeyResult)
    generate_data_key = Operation(GenerateDataKey, GenerateDataKeyResult)
    generate_data_key_without_plaintext = Operation(
        GenerateDataKeyWithoutPlaintext, GenerateDataKeyWithoutPlaintextResult
    )
    encrypt = Operation(Encrypt, EncryptResult)
    decrypt = Operation(Decrypt, DecryptResult)
    re_encrypt = Operation(ReEncrypt, ReEncryptResult)
    describe_key = Operation(DescribeKey, DescribeKeyResult)
    list_keys = Operation(ListKeys, ListKeysResult)
    list_key_versions = Operation(ListKeyVersions, ListKeyVersionsResult)
    list_aliases = Operation(ListAliases, ListAliasesResult)
    get_agent_status = Operation(GetAgentStatus, GetAgentStatusResult)
    get_agent_health = Operation(GetAgentHealth, GetAgentHealthResult)


OPERATIONS: Final[Mapping[str, Operation[..., Any]]] = {
    operation.name: operation for operation in vars(Operations).values() if isinstance(operation, Operation)
}
"""Every operation, by its name in the API."""


def _without_plaintext(values: Any) -> str:
    fields = ((name, "<not shown>" if name == "plaintext" else repr(getattr(values, name))) for name in values._fields)
    return f"{type(values).__name__}({', '.join(f'{name}={value}' for name, value in fields)})"
