"""The targets. To add one: a function that takes bytes, a line here, and its seeds in `fuzz.seeds`."""

from collections.abc import Callable
from typing import NamedTuple

from .answers import answers
from .ciphertexts import ciphertext, context, sm2_ciphertext
from .files import encrypted_file
from .http import http
from .keyrings import identity, keyring
from .operators import audit, configuration
from .public_keys import public_key
from .requests import agent
from .wire import codec

__all__ = ["TARGETS", "Target"]


class Target(NamedTuple):
    """A function that raises when a promise is broken; and how long an input may be: longer ones only cost time."""

    run: Callable[[bytes], None]
    longest: int = 4_096


TARGETS = {
    "codec": Target(codec, 70_000),
    "agent": Target(agent, 16_384),
    "answers": Target(answers, 16_384),
    "ciphertext": Target(ciphertext, 512),
    "context": Target(context, 2_048),
    "sm2_ciphertext": Target(sm2_ciphertext, 1_024),
    "public_key": Target(public_key, 600),
    "encrypted_file": Target(encrypted_file, 2_048),
    "configuration": Target(configuration),
    "keyring": Target(keyring, 8_192),
    "identity": Target(identity),
    "audit": Target(audit, 8_192),
    "http": Target(http, 2_048),
}
