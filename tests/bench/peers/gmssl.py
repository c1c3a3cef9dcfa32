"""gmssl's own SM2 encryption."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from ..cpu import SERVER
from ..run_context import Bare, Way
from ..worker import Worker
from .peer import Peer

__all__ = ["Gmssl"]


class Gmssl(Peer):
    """The package the agent takes curve arithmetic from, where the system's libcrypto has no SM2."""

    name = "gmssl SM2"
    does = (
        "the bare loop with gmssl's own encrypt, which is Python, instead of libcrypto's. Not: a server, protection of keys. "
        "Its nonce is predictable: the agent never calls it"
    )
    bare = Bare("bare EC_SM2")

    def missing(self) -> str:
        return ""  # the agent needs it

    @contextmanager
    def running(self) -> Iterator[Mapping[str, Way]]:
        with Worker(SERVER) as worker:
            yield {"one thread": partial(worker.rate, "gmssl EC_SM2")}
