"""Every operation of the API, declared once. All else follows from here: the agent's checks and answers, the client's
methods with their types, `keyferry call --help`, and the tables in PROTOCOL.md.

To add an operation: declare its request and its result, give it a line in `OPERATIONS`, a handler in the agent's
`handlers`, a method in `Client`.

A request is a tuple whose fields are typed by `parameters`; a field without a default is required. A result is a tuple of
what the answer holds. Fields have the API's names in snake_case: `key_id` is KeyId on the wire.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias, get_type_hints

from .errors import invalid_parameter, missing_parameter
from .parameters import (
    CiphertextBlob,
    DryRun,
    EncryptionContext,
    KeyId,
    KeySpec,
    NumberOfBytes,
    Parameter,
    PublicKeyBlob,
    Values,
    WrappingAlgorithm,
    WrappingKeySpec,
)


@functools.cache
def wire_name(field: str) -> str:
    """The API's name of a field: key_id -> KeyId."""
    return "".join(part.capitalize() for part in field.split("_"))


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


# --- Decrypt ----------------------------------------------------------------------------------------------------------


class Decrypt(NamedTuple):
    """Open a CiphertextBlob and return what is in it, in plaintext."""

    ciphertext_blob: CiphertextBlob
    encryption_context: EncryptionContext = None
    dry_run: DryRun = False


class DecryptResult(NamedTuple):
    key_id: str
    key_version_id: str
    plaintext: str
    request_id: str = ""

    def __repr__(self) -> str:
        return f"DecryptResult(key_id={self.key_id!r}, key_version_id={self.key_version_id!r}, plaintext=<not shown>)"


# --- DescribeKey ------------------------------------------------------------------------------------------------------


class DescribeKey(NamedTuple):
    """Say what a master key is, and what state it is in."""

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


# --- GetAgentStatus ---------------------------------------------------------------------------------------------------


class GetAgentStatus(NamedTuple):
    """Say how the agent is. Needs no grant; with kms:GetAgentStatus it counts connections and requests too."""


class Counters(NamedTuple):
    connections: int
    connections_total: int
    requests_total: int
    requests_refused: int


class GetAgentStatusResult(NamedTuple):
    version: str
    protocol_version: int
    state: str
    started_at: str
    keys: int
    keyring_loaded_at: str
    memory_protection: str
    counters: Counters | None = None
    request_id: str = ""


# --- the table --------------------------------------------------------------------------------------------------------


class Operation:
    """One operation: its `name`, the `request` and `result` that declare it, and what follows from them."""

    __slots__ = ("action", "dry_run", "name", "parameters", "request", "required", "result")

    def __init__(self, request: type[Any], result: type[Any]) -> None:
        self.request = request
        self.result = result
        self.name: str = request.__name__
        self.action = f"kms:{self.name}"
        self.parameters: dict[str, Parameter[Any]] = {
            annotation.__metadata__[0].name: annotation.__metadata__[0]
            for annotation in request.__annotations__.values()
        }
        self.required = [wire_name(field) for field in request._fields if field not in request._field_defaults]
        self.dry_run = "DryRun" in self.parameters

    @property
    def doc(self) -> str:
        """What the operation does, in a sentence or two."""
        return self.request.__doc__ or ""

    def check(self, params: Mapping[str, Any]) -> Values:
        """Check a request's parameters and give them in canonical form.

        Raises `MissingParameter` or `InvalidParameter`, with the name. An unknown name is refused: a misspelt
        EncryptionContext must never be ignored. None counts as absent.
        """
        checked: dict[str, Any] = {}
        for name, value in params.items():
            parameter = self.parameters.get(name)
            if parameter is None:
                shown = ascii(name[:40])[1:-1]
                raise invalid_parameter(shown, f"{self.name} knows no such parameter.")
            if value is not None:
                checked[name] = parameter.check(name, value)
        for name in self.required:
            if name not in checked:
                raise missing_parameter(name)
        return Values(checked)


OPERATIONS: Final[Mapping[str, Operation]] = {
    operation.name: operation
    for operation in (
        Operation(GenerateAndExportDataKey, GenerateAndExportDataKeyResult),
        Operation(ExportDataKey, ExportDataKeyResult),
        Operation(Decrypt, DecryptResult),
        Operation(DescribeKey, DescribeKeyResult),
        Operation(GetAgentStatus, GetAgentStatusResult),
    )
}

AnyResult: TypeAlias = (
    GenerateAndExportDataKeyResult | ExportDataKeyResult | DecryptResult | DescribeKeyResult | GetAgentStatusResult
)


# --- tuples to and from the wire --------------------------------------------------------------------------------------


def request_to_wire(request: Any) -> dict[str, Any]:
    """The parameters of a request tuple as they travel; what is absent or false does not."""
    return {
        wire_name(field): value
        for field, value in zip(request._fields, request, strict=True)
        if value is not None and value is not False
    }


def result_to_wire(result: Any) -> dict[str, Any]:
    """A result tuple as it travels: nested tuples become maps, None is left out."""
    return {
        wire_name(field): result_to_wire(value) if hasattr(value, "_fields") else value
        for field, value in zip(result._fields, result, strict=True)
        if value is not None
    }


def result_from_wire(kind: type[Any], answer: Mapping[str, Any]) -> Any:
    """Make the result tuple `kind` of an answer. Fields it does not know are ignored: a newer agent may send more.

    Raises KeyError when the answer lacks a field.
    """
    values: dict[str, Any] = {}
    for field, hint in get_type_hints(kind).items():
        name = wire_name(field)
        if name not in answer and field in kind._field_defaults:
            continue
        nested = next((h for h in (hint, *getattr(hint, "__args__", ())) if hasattr(h, "_fields")), None)
        values[field] = result_from_wire(nested, answer[name]) if nested else answer[name]
    return kind(**values)
