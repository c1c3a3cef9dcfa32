"""Cryptographic modules, which hold a private key, import exported data keys, and encrypt with them.

All modules have the same interface. `public_key_blob`, `wrapping_key_spec` and `wrapping_algorithm` are the parameters for
exporting a data key to a module. `import_data_key` returns a handle to an ExportedDataKey; `encrypt`, `decrypt` and `forget`
use the handle. No method returns a data key.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

from .interface import CryptographicModule, DataKey, DataKeyRecord, ModuleError

if TYPE_CHECKING:
    from .pkcs11 import Pkcs11Module
    from .software import SoftwareModule

__all__ = ["CryptographicModule", "DataKey", "DataKeyRecord", "ModuleError", "Pkcs11Module", "SoftwareModule"]

_EXTRAS: Final = {"SoftwareModule": ("software", "module"), "Pkcs11Module": ("pkcs11", "pkcs11")}
"""The module file of each class, and the extra that installs its dependencies: one class works without the other's extra."""


def __getattr__(name: str) -> Any:
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file, extra = _EXTRAS[name]
    try:
        module_class = getattr(importlib.import_module(f".{file}", __name__), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ImportError(
            f'{name} needs {package}; install the extra "{extra}" of keyferry (docs/installing.md)', name=error.name
        ) from None
    globals()[name] = module_class
    return module_class
