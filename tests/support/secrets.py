"""Files with secrets, as their owners keep them: no other user can read them."""

from pathlib import Path


def secret_file(path: Path, content: str | bytes) -> Path:
    """Write a file of mode 0600; return its path."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
