"""Files encrypted with a data key that is in a cryptographic module, in chunks: any size, in constant memory.

    with open("report.pdf", "rb") as source, open("report.kf", "wb") as target:
        encrypt(source, target, module, key, record)

    with open("report.kf", "rb") as source, replacing("report.pdf") as target:
        header = read_header(source)
        decrypt(source, target, module, module.recover_data_key(kms, header.record), header)

docs/files.md specifies the format and explains it. Needs the extra `module`.
"""

from .atomic import replacing
from .attributes import Attributes
from .header import FileError, Header, read_header
from .stream import decrypt, encrypt, plaintext_hash, reencrypt

__all__ = [
    "Attributes",
    "FileError",
    "Header",
    "decrypt",
    "encrypt",
    "plaintext_hash",
    "read_header",
    "reencrypt",
    "replacing",
]
