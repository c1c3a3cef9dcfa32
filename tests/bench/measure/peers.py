"""Other programs that do the same job as nearly as they can, measured in the same way."""

from ..peers import PEERS
from ..run_context import Session

PART = "Peers, beside the same bare loop"


def run(session: Session) -> None:
    """Add a line or two for each peer, and one line for a missing peer."""
    for peer in PEERS:
        missing = peer.missing()
        if missing:
            session.say(f"{peer.name}: {missing}")
            session.add(PART, peer.name, [], note=f"not measured: {missing}")
            continue
        with peer.running() as ways:
            made = session.beside(ways, peer.bare)
        for name, measured in made.items():
            session.add(PART, f"{peer.name}, {name}", measured.ratios, absolute=measured.absolute, note=peer.does)
