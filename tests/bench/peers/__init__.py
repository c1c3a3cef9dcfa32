"""Other programs that make a data key, encrypt it under a key they hold, and under a module's public key.

Each describes exactly its work and its omissions. One that is not installed is a line in the table.
"""

from typing import Final

from .gmssl import Gmssl
from .moto import Moto
from .openbao import OpenBao
from .peer import Peer

__all__ = ["PEERS", "Peer"]

PEERS: Final[tuple[Peer, ...]] = (OpenBao(), Moto(), Gmssl())
