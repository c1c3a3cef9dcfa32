"""OpenSSL's configuration, for messages: it is the usual reason why an algorithm is missing that was built."""

import os
import re
from typing import Final

__all__ = ["configuration", "cryptography_failure"]

_CONFIGURATION_VARIABLE: Final = "OPENSSL_CONF"


def configuration() -> str:
    """Return the name of OpenSSL's configuration for a message: the environment variable that chooses the file."""
    path = os.environ.get(_CONFIGURATION_VARIABLE)
    return (
        f"{_CONFIGURATION_VARIABLE}={path}"
        if path
        else f"{_CONFIGURATION_VARIABLE} is not set: the system's openssl.cnf"
    )


def cryptography_failure(error: BaseException) -> str | None:
    """Return one line if the `cryptography` package raised this error because its OpenSSL lacks something, else None.

    The package has an OpenSSL of its own, which reads the same configuration. The package may not be importable.
    """
    kind = f"{type(error).__module__}.{type(error).__name__}"
    if kind not in ("cryptography.exceptions.InternalError", "cryptography.exceptions.UnsupportedAlgorithm") and not (
        isinstance(error, ImportError | RuntimeError) and "OpenSSL" in str(error)
    ):
        return None
    algorithm = re.search(r"Algorithm \(([^ )]+)", str(error))
    reason = f"it does not offer {algorithm.group(1)}" if algorithm else str(error).partition("\n")[0]
    return f"the cryptography package does not work with this OpenSSL's configuration ({configuration()}): {reason}"
