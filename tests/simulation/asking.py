"""What a simulated client asks for, and what it may be answered: a second, much simpler judge of every request.

The judge knows the page on operations, the keyring and the configuration as plain data; it shares no code with the agent.
"""

import random
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from keyferry.parameters import encode_base64

from . import stock
from .stock import Blob, Grant, MasterKey, Ring, RingKey

__all__ = ["Ask", "judge", "random_ask"]

PLAIN: Final = "plaintext"


class Ask(NamedTuple):
    """One request. What is not part of its operation is as it is by default."""

    method: str
    params: Mapping[str, Any]
    alias: str = ""
    context: Mapping[str, str] = {}
    blob: Blob | None = None
    to: str = ""
    """The WrappingAlgorithm of the recipient."""
    size: int = 32
    plaintext: bytes = b""
    destination_context: Mapping[str, str] = {}
    dry: bool = False
    always: str = ""
    """The code of a refusal that does not depend on who asks when."""


_METHODS: Final = {
    "GenerateAndExportDataKey": 6,
    "ExportDataKey": 4,
    "GenerateDataKey": 3,
    "GenerateDataKeyWithoutPlaintext": 3,
    "Encrypt": 4,
    "Decrypt": 4,
    "ReEncrypt": 3,
    "DescribeKey": 2,
    "ListKeys": 1,
    "ListAliases": 1,
    "GetAgentStatus": 2,
    "Nonsense": 1,
}
_ALIASES: Final = ("alias/orders",) * 4 + ("alias/pay", "alias/off", "alias/going", "alias/none")


def random_ask(rng: random.Random) -> Ask:
    """Any request."""
    method = rng.choices([*_METHODS], [*_METHODS.values()])[0]
    params: dict[str, Any] = {}
    alias, context, to, size, blob, plaintext = "", {}, "", 32, None, b""
    destination_context: dict[str, str] = {}
    if method in ("ExportDataKey", "Decrypt", "ReEncrypt"):
        blob = rng.choice(stock.blobs())
        context = dict(blob.context if rng.random() < 0.9 else rng.choice(stock.CONTEXTS))
        params["CiphertextBlob"] = blob.blob if rng.random() < 0.3 else encode_base64(blob.blob)
        if method == "ReEncrypt":
            alias, destination_context = rng.choice(_ALIASES), rng.choice(stock.CONTEXTS)
            params |= {"DestinationKeyId": alias, "DestinationEncryptionContext": destination_context}
    elif method in ("ListKeys", "ListAliases", "GetAgentStatus", "Nonsense"):
        pass
    else:
        alias = rng.choice(_ALIASES)
        params["KeyId"] = alias
        if method != "DescribeKey":
            context = rng.choice(stock.CONTEXTS)
    if method.endswith("ExportDataKey") or method == "GenerateAndExportDataKey":
        to = rng.choice(("RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1", "SM2PKE", "SM2PKE"))
        params |= stock.recipients()[to].params
    if method.startswith("Generate"):
        size = rng.choice((1, 16, 32, 64))
        params["NumberOfBytes"] = size
    if method == "Encrypt":
        plaintext = rng.randbytes(rng.choice((1, 32, 900)))
        params["Plaintext"] = encode_base64(plaintext)
    if context:
        params["SourceEncryptionContext" if method == "ReEncrypt" else "EncryptionContext"] = context
    dry = bool(params) and method != "DescribeKey" and rng.random() < 0.06
    if dry:
        params["DryRun"] = True
    always = "InvalidAction.NotFound" if method == "Nonsense" else ""
    if method not in ("Nonsense", "GetAgentStatus") and rng.random() < 0.04:
        params["EncryptoinContext"] = "x"
        always = "InvalidParameter"
    return Ask(method, params, alias, context, blob, to, size, plaintext, destination_context, dry, always)


def judge(ask: Ask, uid: int, ring: Ring, grants: tuple[Grant, ...], when: float) -> str:
    """The outcome of a request that this user makes at a time: `OK`, or the code of the error."""
    code = ask.always or _judge(ask, uid, ring, grants, when)
    if not ask.dry:
        return code
    dry = {"OK": "DryRunOperationError", "InvalidParameter": "ValidationError", "MissingParameter": "ValidationError"}
    return dry.get(code, "AccessDeniedError" if code == "Forbidden.NoPermission" else code)


def _judge(ask: Ask, uid: int, ring: Ring, grants: tuple[Grant, ...], when: float) -> str:
    present = [entry for entry in ring if not (entry.delete_date and when >= stock.DELETED_AFTER)]
    mine = [grant for grant in grants if grant.uid == uid]

    def may(action: str, names: tuple[str, ...] | None, pin: str | None, context: Mapping[str, str] | None) -> bool:
        return any(_covers(grant, action, names, pin, context) for grant in mine)

    def named(action: str, pin: str | None, context: Mapping[str, str] | None) -> RingKey | str:
        found = next((entry for entry in present if ask.alias in entry.aliases), None)
        names = (ask.alias,) if found is None else (found.key.key_id, *found.aliases)
        if not may(action, names, pin, context):
            return "Forbidden.NoPermission"
        return found or "Forbidden.AliasNotFound"

    def opening(action: str, pin: str | None) -> RingKey | str:
        assert ask.blob is not None
        found = _holding(present, ask.blob)
        if not may(action, (found.key.key_id, *found.aliases) if found else None, pin, ask.context):
            return "Forbidden.NoPermission"
        return found or "Forbidden.KeyVersionNotFound"

    def usable(*entries: RingKey | str) -> str:
        for entry in entries:
            if isinstance(entry, str):
                return entry
        bad = [entry.state for entry in entries if isinstance(entry, RingKey) and entry.state != "Enabled"]
        return f"Rejected.{bad[0]}" if bad else "OK"

    def opens(code: str) -> str:
        assert ask.blob is not None
        whole = ask.blob.opens and dict(ask.blob.context) == dict(ask.context)
        return "InvalidParameter" if code == "OK" and not whole else code

    match ask.method:
        case "GetAgentStatus":
            return "OK"
        case "ListKeys" | "ListAliases":
            return "OK" if may(ask.method, None, None, None) else "Forbidden.NoPermission"
        case "DescribeKey":
            entry = named(ask.method, None, None)
            return entry if isinstance(entry, str) else "OK"
        case "GenerateAndExportDataKey":
            return usable(named(ask.method, ask.to, ask.context))
        case "GenerateDataKey":
            return usable(named(ask.method, PLAIN, ask.context))
        case "GenerateDataKeyWithoutPlaintext" | "Encrypt":
            return usable(named(ask.method, None, ask.context))
        case "Decrypt":
            return opens(usable(opening(ask.method, PLAIN)))
        case "ExportDataKey":
            return opens(usable(opening(ask.method, ask.to)))
        case "ReEncrypt":
            if not may("ReEncryptTo", None, None, None):
                return "Forbidden.NoPermission"
            source = opening("ReEncryptFrom", None)
            if isinstance(source, str):
                return source
            destination = named("ReEncryptTo", None, ask.destination_context)
            if isinstance(destination, str):
                return destination
            stays = destination is source and dict(ask.context) == dict(ask.destination_context)
            if not stays and isinstance(denied := opening("ReEncryptFrom", PLAIN), str):
                return denied
            return opens(usable(source, destination))
    raise AssertionError(ask.method)


def _holding(present: list[RingKey], blob: Blob) -> RingKey | None:
    """The key, if the keyring has the version that the blob names."""
    for entry in present:
        if blob.version in entry.key.versions[: entry.versions]:
            return entry
    return None


def _covers(
    grant: Grant, action: str, names: tuple[str, ...] | None, pin: str | None, context: Mapping[str, str] | None
) -> bool:
    return (
        any(_like(pattern, action) for pattern in grant.actions)
        and (names is None or any(_like(pattern, name) for pattern in grant.keys for name in names))
        and (not grant.recipients or pin is None or _same_key(pin, grant.recipients))
        and (context is None or all(context.get(key) == value for key, value in grant.context.items()))
    )


def _like(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _same_key(to: str, allowed: tuple[str, ...]) -> bool:
    # Both hashes of RSA go to the same key.
    return to[:3] in {algorithm[:3] for algorithm in allowed}


def master_key(ring: Ring, alias: str) -> tuple[MasterKey, str] | None:
    """The key that an alias names, and its primary version's ID."""
    found = next((entry for entry in ring if alias in entry.aliases), None)
    return None if found is None else (found.key, found.primary.version_id)
