"""The software module, against the primitives that it consists of."""

from functools import partial

from ..figures import Target
from ..run_context import Bare, Session

PART = "The software module"


def run(session: Session) -> None:
    """Import against RSA decryption, encryption of 1 MiB against the AEAD, in one process on one core."""
    pairs = {
        "import a data key": ("module import", "RSA decryption"),
        "encrypt 1 MiB": ("module encrypt", "AEAD encrypt"),
        "decrypt 1 MiB": ("module decrypt", "AEAD decrypt"),
    }
    made = session.beside(
        {name: partial(session.alone.rate, loop) for name, (loop, _) in pairs.items()},
        {name: Bare(bare) for name, (_, bare) in pairs.items()},
    )
    for name, measured in made.items():
        bare = pairs[name][1]
        session.add(
            PART,
            name,
            measured.ratios,
            unit=f"× {bare}",
            absolute=measured.absolute,
            target=Target("at least", 0.9),
        )
