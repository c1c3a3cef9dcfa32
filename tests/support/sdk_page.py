"""The code blocks of docs/how-to/use-the-alibaba-sdk.md, with a test's gateway in place of the one of the page."""

import re
from typing import Final

from .gateway import Prepared
from .skip_unless import ROOT

PAGE: Final = ROOT / "docs" / "how-to" / "use-the-alibaba-sdk.md"
_BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ENDPOINT: Final = "127.0.0.1:8461"
_CA: Final = "/etc/keyferry/tls/ca.pem"


def blocks(language: str) -> list[str]:
    """Return the code blocks in a language."""
    return [code for name, code in _BLOCK.findall(PAGE.read_text("utf-8")) if name == language]


def languages() -> set[str]:
    """Return the languages of all code blocks."""
    return {name for name, _ in _BLOCK.findall(PAGE.read_text("utf-8"))}


def on(code: str, prepared: Prepared) -> str:
    """Return a block that calls the https gateway of a test. The keyring needs the key alias/orders."""
    assert _ENDPOINT in code
    return code.replace(_ENDPOINT, f"127.0.0.1:{prepared.https_port}").replace(_CA, str(prepared.ca))


def environment(prepared: Prepared) -> dict[str, str]:
    """Return the variables that the page tells the reader to set."""
    (exported,) = blocks("sh")
    names = re.findall(r"^export (\w+)=", exported, re.MULTILINE)
    assert names == ["ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"]
    credentials = prepared.credentials
    return {
        **dict(zip(names, (credentials.access_key_id, credentials.secret), strict=True)),
        "ALIBABA_CLOUD_CA_BUNDLE": str(prepared.ca),
        "NODE_EXTRA_CA_CERTS": str(prepared.ca),
    }
