"""Other programs that make a data key, encrypt it under a key they hold, and under a module's public key.

Each says exactly what it does and what it does not. One that is not installed is a line in the table that says so.
"""

from typing import Final

from .gmssl import Gmssl
from .moto import Moto
from .openbao import OpenBao
from .peer import Peer

__all__ = ["PEERS", "Peer"]

PEERS: Final[tuple[Peer, ...]] = (OpenBao(), Moto(), Gmssl())
