"""Reading of secrets that a verb imports, from a file or from standard input."""

from ...keyring.document import KeyringError

__all__ = ["read_secret"]


def read_secret(path: str, max_bytes: int) -> bytearray:
    """Return the content of a file, or of standard input for `-`. The caller refuses a result of more than `max_bytes`.

    At most the limit and one more piece are read. Raises `KeyringError`.
    """
    secret = bytearray()
    try:
        with open(0 if path == "-" else path, "rb", buffering=0, closefd=path != "-") as source:
            while len(secret) <= max_bytes and (read := source.read(max_bytes)):
                secret += read
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
    return secret
