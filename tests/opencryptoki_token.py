"""Prints how opencryptoki's soft token treats a data key, as JSON. Runs beside its daemon: support/opencryptoki.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pkcs11 import Attribute, PKCS11Error
from support.tokens import KEY, RealToken

from keyferry.module import ModuleError, Pkcs11Module
from keyferry.module import token as token_module
from keyferry.module.cryptoki import Library
from keyferry.module.pin import read_pin
from keyferry.module.token import KeyPairChoice, Pkcs11Session
from keyferry.module.token_choice import TokenChoice

library, pin_file = map(Path, sys.argv[1:])
ock = RealToken(library, "ock", pin_file)
said: dict[str, Any] = {"wrong sizes": []}


def state(key: Any) -> list[Any]:
    """Return sensitive, extractable, and the value if the token shows it."""
    try:
        value = key[Attribute.VALUE].hex()
    except PKCS11Error:
        value = None
    return [key[Attribute.SENSITIVE], key[Attribute.EXTRACTABLE], value]


def watched(key: Any, purpose: str) -> None:
    """Harden a key, and keep its attributes from before."""
    if "data key" in purpose:
        said.setdefault("before", state(key))
    harden(key, purpose)


harden, token_module._harden = token_module._harden, watched

session = Pkcs11Session(
    Library(library, None), KeyPairChoice(TokenChoice("ock"), KEY, read_pin(pin_file, None)), generate=True
)
public = rsa.RSAPublicNumbers(session.exponent, session.modulus).public_key()


def wrap(data_key: bytes) -> bytes:
    """Wrap with RSAES_OAEP_SHA_256."""
    digest = hashes.SHA256()
    return public.encrypt(data_key, padding.OAEP(padding.MGF1(digest), digest, None))


known = os.urandom(32)
said["known"] = known.hex()
said["after"] = state(session.unwrap(wrap(known), "RSAES_OAEP_SHA_256"))
for size in (1, 17, 64):
    try:
        session.unwrap(wrap(os.urandom(size)), "RSAES_OAEP_SHA_256")
    except ModuleError as error:
        said["wrong sizes"].append(str(error))
try:
    module = ock.open()
    said["opened"] = module.wrapping_algorithm
except ModuleError as error:
    said["refused"] = str(error)
session.close()

said["wrong PINs"] = []
for _ in range(9):
    try:
        Pkcs11Module.open(library, token_label="ock", key_label=KEY, pin=lambda: "99999999")
    except ModuleError as error:
        said["wrong PINs"].append(str(error))
tool = ["pkcs11-tool", "--module", str(library), "--token-label", "ock", "--login", "--pin", pin_file.read_text()]
subprocess.run([*tool, "--list-objects"], check=True, capture_output=True)
print(json.dumps(said))
