"""Cryptographic modules: what holds a private key, imports exported data keys, and encrypts with them.

All modules have the same face: `public_key_blob`, `wrapping_key_spec` and `wrapping_algorithm` say how to export a data key
to them; `import_data_key` turns an ExportedDataKey into a handle; `encrypt`, `decrypt` and `forget` use it. Nothing reads a
data key out again.
"""

from .interface import CryptographicModule, DataKey, DataKeyRecord, ModuleError
from .software import SoftwareModule

__all__ = ["CryptographicModule", "DataKey", "DataKeyRecord", "ModuleError", "SoftwareModule"]
