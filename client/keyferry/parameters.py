"""Every parameter of the API, declared once: its Python type, the agent's check, and its description.

The agent checks parameters, never the client: so there is one set of checks, and every error has a RequestId. A check
converts the value from the wire to its canonical form, or raises `InvalidParameter` with the parameter's name. Base64 becomes
bytes, JSON text a dictionary, and "true" becomes True.
"""

import binascii
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeAlias, TypeVar, cast

from .errors import invalid_parameter

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MAX_CONTEXT: Final = 8_192
"""Characters of an EncryptionContext as JSON (the cloud's documented limit)."""
MAX_DATA_KEY: Final = 1_024
"""Bytes of a data key (the cloud's documented limit)."""
MAX_PLAINTEXT: Final = 6_144
"""Most bytes of plaintext for Encrypt (the cloud's documented 6 KB)."""
MAX_PAGE: Final = 100
"""Entries on a page of a list (the cloud's documented limit)."""
PAGE: Final = 10
"""Entries on a page of a list where PageSize is absent."""
MAX_PAGE_NUMBER: Final = 2**31 - 1
"""Largest PageNumber: the cloud's type for it is int32."""
MAX_KEY_ID: Final = 512
"""Most characters of a KeyId in any form. An alias of 255 characters, with the rest of its ARN, is shorter."""
DATA_KEY_SPECS: Final = {"AES_256": 32, "AES_128": 16, "SM4_128": 16}
"""Bytes of a data key by KeySpec."""


class Parameter(Generic[T_co]):
    """A parameter's name on the wire, its check and its description. `values` are the possible values, for shell completion."""

    __slots__ = ("check", "doc", "integer", "name", "values")

    def __init__(
        self,
        name: str,
        check: Callable[[str, Any], T_co],
        doc: str,
        *,
        integer: bool = False,
        values: Iterable[str] = (),
    ) -> None:
        self.name = name
        self.check = check
        self.doc = doc
        self.integer = integer
        self.values = tuple(values)

    def __repr__(self) -> str:
        return f"Parameter({self.name})"


_KINDS: Final = {
    str: "a string",
    bytes: "binary",
    bool: "a boolean",
    int: "an integer",
    list: "an array",
    dict: "a map",
}


def _kind(value: Any) -> str:
    """Return the kind of a value in MessagePack's terms."""
    return _KINDS.get(type(value), "nil")


# --- checks: a name and a value from the wire -> the canonical value --------------------------------------------------


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid_parameter(name, f"a string is expected, not {_kind(value)}.")
    if not value:
        raise invalid_parameter(name, "it is empty.")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise invalid_parameter(name, "it is not valid UTF-8.")
    return value


def _key_id(name: str, value: Any) -> str:
    text = _text(name, value)
    if len(text) > MAX_KEY_ID:
        raise invalid_parameter(name, f"it is longer than {MAX_KEY_ID} characters.")
    return text


def decode_base64(value: str) -> bytes:
    """Decode canonical Base64: the standard alphabet, padded, no white space, no stray bits. Raises ValueError."""
    data = binascii.a2b_base64(value.encode("ascii"), strict_mode=True)
    # strict_mode does not check the unused bits of the last character, so several texts would decode to these bytes.
    if binascii.b2a_base64(data, newline=False).decode() != value:
        raise ValueError("not the canonical Base64 of its bytes")
    return data


def encode_base64(data: bytes | bytearray | memoryview) -> str:
    """Return standard Base64 on one line, the API's encoding."""
    return binascii.b2a_base64(data, newline=False).decode()


def _binary(name: str, value: Any) -> bytes | None:
    """Return the bytes of a parameter that may be Base64 or binary, and None for text that is not Base64."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise invalid_parameter(name, f"Base64 text or binary is expected, not {_kind(value)}.")
    try:
        return decode_base64(value)
    except ValueError:
        return None


def _blob(name: str, value: Any) -> bytes:
    blob = _binary(name, value)
    if blob is None:
        if value.startswith("-----BEGIN"):
            raise invalid_parameter(name, "it is PEM; the Base64 of the DER is expected, without armour.")
        raise invalid_parameter(name, "it is not Base64 on one line, padded, without white space.")
    return blob


def _ciphertext(name: str, value: Any) -> bytes:
    return _binary(name, value) or b""  # damaged text gets the same error as every ciphertext that does not open


def _plaintext(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        raise invalid_parameter(name, "Base64 text is expected, not binary.")
    data = _blob(name, value)
    if not 1 <= len(data) <= MAX_PLAINTEXT:
        raise invalid_parameter(name, f"it has {len(data)} bytes; 1 to {MAX_PLAINTEXT} are allowed.")
    return data


def _data_key_spec(name: str, value: Any) -> int:
    if not isinstance(value, str) or value not in DATA_KEY_SPECS:
        raise invalid_parameter(name, f"one of {', '.join(DATA_KEY_SPECS)} is expected.")
    return DATA_KEY_SPECS[value]


def _whole_number(minimum: int, maximum: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid_parameter(name, f"an integer is expected, not {_kind(value)}.")
        if not minimum <= value <= maximum:
            raise invalid_parameter(name, f"it is {value}; {minimum} to {maximum} are allowed.")
        return value

    return check


def _dry_run(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise invalid_parameter(name, 'true or false is expected, as a boolean or as text ("true", "false").')


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dictionary. Raises ValueError for a repeated key. For `object_pairs_hook`."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("the same key twice")
    return entries


_TEXT: Final = frozenset({str})
_MAX_JSON_ESCAPE: Final = 6
"""Most characters that JSON writes for one character of ASCII."""


def _json() -> Any:
    import json  # noqa: PLC0415 - `import keyferry` is kept short, and clients check nothing

    return json


def _encryption_context(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, str):
        if len(value) > MAX_CONTEXT:
            raise invalid_parameter(name, f"its JSON has {len(value)} characters; at most {MAX_CONTEXT} are allowed.")
        try:
            value = _json().loads(value, object_pairs_hook=unique_pairs)
        except (ValueError, RecursionError):
            raise invalid_parameter(name, "it is not the JSON of one object with each key once.") from None
    if not isinstance(value, dict) or not _TEXT.issuperset(map(type, value.values())):
        raise invalid_parameter(name, "a map (or its JSON text) of strings to strings is expected.")
    characters = "".join([*value, *value.values()])
    if characters.isascii() and _MAX_JSON_ESCAPE * (len(characters) + len(value)) < MAX_CONTEXT:
        return value
    # The cloud too measures the JSON. Here, characters outside ASCII count as one: escapes for ASCII output are not counted.
    text = _json().dumps(value, ensure_ascii=False, separators=(",", ":"))
    if len(text) > MAX_CONTEXT:
        raise invalid_parameter(name, f"as JSON it has {len(text)} characters; at most {MAX_CONTEXT} are allowed.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise invalid_parameter(name, "a key or a value is not valid UTF-8.") from None
    return value


# --- the parameters, and the type each has in Python ------------------------------------------------------------------

KEY_ID = Parameter("KeyId", _key_id, "The master key: a key ID, alias/NAME, or an ARN of either.")
KeyId: TypeAlias = Annotated[str, KEY_ID]

KEY_SPEC = Parameter(
    "KeySpec",
    _data_key_spec,
    "Length of the data key: AES_256 (32 bytes, the default), AES_128 (16) or SM4_128 (16).",
    values=DATA_KEY_SPECS,
)
KeySpec: TypeAlias = Annotated[str | None, KEY_SPEC]

NUMBER_OF_BYTES = Parameter(
    "NumberOfBytes",
    _whole_number(1, MAX_DATA_KEY),
    f"Length of the data key in bytes, 1 to {MAX_DATA_KEY}. Wins over KeySpec.",
    integer=True,
)
NumberOfBytes: TypeAlias = Annotated[int | None, NUMBER_OF_BYTES]

ENCRYPTION_CONTEXT = Parameter(
    "EncryptionContext",
    _encryption_context,
    f"Pairs of strings, at most {MAX_CONTEXT} characters as JSON, bound to the ciphertext and needed again to open it.",
)
EncryptionContext: TypeAlias = Annotated[Mapping[str, str] | str | None, ENCRYPTION_CONTEXT]

PUBLIC_KEY_BLOB = Parameter(
    "PublicKeyBlob", _blob, "The module's public key: DER SubjectPublicKeyInfo, in Base64 or as binary."
)
PublicKeyBlob: TypeAlias = Annotated[str | bytes, PUBLIC_KEY_BLOB]

WRAPPING_KEY_SPEC = Parameter(
    "WrappingKeySpec", _text, "The kind of that public key: RSA_2048 or EC_SM2.", values=("RSA_2048", "EC_SM2")
)
WrappingKeySpec: TypeAlias = Annotated[str, WRAPPING_KEY_SPEC]

WRAPPING_ALGORITHM = Parameter(
    "WrappingAlgorithm",
    _text,
    "The algorithm that encrypts the data key to it: RSAES_OAEP_SHA_256 or RSAES_OAEP_SHA_1 with RSA_2048, SM2PKE with EC_SM2.",
    values=("RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1", "SM2PKE"),
)
WrappingAlgorithm: TypeAlias = Annotated[str, WRAPPING_ALGORITHM]

CIPHERTEXT_BLOB = Parameter(
    "CiphertextBlob", _ciphertext, "The ciphertext that an earlier call returned, in Base64 or as binary."
)
CiphertextBlob: TypeAlias = Annotated[str | bytes, CIPHERTEXT_BLOB]

SOURCE_ENCRYPTION_CONTEXT = Parameter(
    "SourceEncryptionContext", _encryption_context, "The EncryptionContext that the ciphertext was made with."
)
SourceEncryptionContext: TypeAlias = Annotated[Mapping[str, str] | str | None, SOURCE_ENCRYPTION_CONTEXT]

DESTINATION_KEY_ID = Parameter(
    "DestinationKeyId", _key_id, "The master key to encrypt under: a key ID, alias/NAME, or an ARN of either."
)
DestinationKeyId: TypeAlias = Annotated[str, DESTINATION_KEY_ID]

DESTINATION_ENCRYPTION_CONTEXT = Parameter(
    "DestinationEncryptionContext", _encryption_context, "The EncryptionContext for the new ciphertext."
)
DestinationEncryptionContext: TypeAlias = Annotated[Mapping[str, str] | str | None, DESTINATION_ENCRYPTION_CONTEXT]

PAGE_NUMBER = Parameter(
    "PageNumber", _whole_number(1, MAX_PAGE_NUMBER), "The number of the page, from 1 (the default).", integer=True
)
PageNumber: TypeAlias = Annotated[int | None, PAGE_NUMBER]

PAGE_SIZE = Parameter(
    "PageSize", _whole_number(1, MAX_PAGE), f"Entries on a page, 1 to {MAX_PAGE}; {PAGE} by default.", integer=True
)
PageSize: TypeAlias = Annotated[int | None, PAGE_SIZE]

PLAINTEXT = Parameter("Plaintext", _plaintext, f"The bytes to encrypt: Base64 of 1 to {MAX_PLAINTEXT} bytes.")
Plaintext: TypeAlias = Annotated[str | bytes, PLAINTEXT]

DRY_RUN = Parameter(
    "DryRun",
    _dry_run,
    "true: only return the outcome that the call would have. Such a call always fails.",
    values=("true", "false"),
)
DryRun: TypeAlias = Annotated[bool | str, DRY_RUN]


class Values(NamedTuple):
    """The checked parameters of one request, in canonical form. A value has the type that its parameter declares."""

    by_name: Mapping[str, Any]

    def get(self, parameter: Parameter[T]) -> T | None:
        """Return the value of an optional parameter, or None if it is absent."""
        return cast("T | None", self.by_name.get(parameter.name))

    def need(self, parameter: Parameter[T]) -> T:
        """Return the value of a required parameter."""
        return cast("T", self.by_name[parameter.name])
