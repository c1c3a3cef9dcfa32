"""Cryptographic modules: what holds a private key, imports exported data keys, and encrypts with them.

All modules have the same face: `public_key_blob`, `wrapping_key_spec` and `wrapping_algorithm` say how to export a data key
to them; `import_data_key` turns an ExportedDataKey into a handle; `encrypt`, `decrypt` and `forget` use it. Nothing reads a
data key out again.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

from .interface import CryptographicModule, DataKey, DataKeyRecord, ModuleError

if TYPE_CHECKING:
    from .pkcs11 import Pkcs11Module
    from .software import SoftwareModule

__all__ = ["CryptographicModule", "DataKey", "DataKeyRecord", "ModuleError", "Pkcs11Module", "SoftwareModule"]

_EXTRAS: Final = {"SoftwareModule": ("software", "module"), "Pkcs11Module": ("pkcs11", "pkcs11")}
"""The module file of each class, and the extra that brings what it needs: who has one need not have the other."""


def __getattr__(name: str) -> Any:
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file, extra = _EXTRAS[name]
    try:
        found = getattr(importlib.import_module(f".{file}", __name__), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise ImportError(
            f'{name} needs {missing}; install the extra "{extra}" of keyferry (docs/installing.md)', name=error.name
        ) from None
    globals()[name] = found
    return found
