"""Keyferry: data keys without ever seeing them, from the key agent of this host.

    from keyferry import Client

    with Client() as kms:
        made = kms.generate_and_export_data_key(key_id="alias/orders", ...)

Importing this package loads the standard library and msgpack, nothing else. Cryptographic modules are in
`keyferry.module` (extra `module`).
"""

from typing import TYPE_CHECKING, Any

from .errors import (
    AccessDenied,
    AgentUnavailable,
    DryRun,
    InvalidRequest,
    KeyferryError,
    KeyUnusable,
    KmsError,
    NotFound,
    ProtocolError,
    Throttled,
)

if TYPE_CHECKING:
    from .client import Client

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "AgentUnavailable",
    "Client",
    "DryRun",
    "InvalidRequest",
    "KeyUnusable",
    "KeyferryError",
    "KmsError",
    "NotFound",
    "ProtocolError",
    "Throttled",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # The client is imported when somebody wants it: the agent, and whoever only asks for the version, does not.
    if name != "Client":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .client import Client  # noqa: PLC0415

    globals()[name] = Client
    return Client
