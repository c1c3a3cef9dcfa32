"""Client of the Keyferry agent: obtains data keys from the key agent of this host, without ever seeing them.

    from keyferry import Client

    with Client() as kms:
        made = kms.generate_and_export_data_key(key_id="alias/orders", ...)

Importing this package loads only parts of the standard library and msgpack. Cryptographic modules are in `keyferry.module`
(extra `module`).
"""

from .client import Client
from .errors import (
    AccessDenied,
    AgentUnavailable,
    DryRun,
    InternalFailure,
    InvalidRequest,
    KeyferryError,
    KeyUnusable,
    KmsError,
    NotFound,
    ProtocolError,
    ServiceUnavailable,
    Throttled,
)
from .retry import Retry

__version__ = "0.2.0.dev0"

__all__ = [
    "AccessDenied",
    "AgentUnavailable",
    "Client",
    "DryRun",
    "InternalFailure",
    "InvalidRequest",
    "KeyUnusable",
    "KeyferryError",
    "KmsError",
    "NotFound",
    "ProtocolError",
    "Retry",
    "ServiceUnavailable",
    "Throttled",
    "__version__",
]
