"""The state of an agent in the process of the tests, for faults and times that no agent in a process of its own can have."""

import os
from pathlib import Path

from keyferry_agent.audit import AuditLog
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.settings import Audit, Settings
from keyferry_agent.keyring.keyring import development_keyring
from keyferry_agent.state import ServerState


def new_agent() -> ServerState:
    """Return the state of an agent that grants everything to this user, with a keyring for development."""
    everything = Grant("all", {"uid": os.geteuid()}, ("kms:*",), ("*",))
    settings = Settings(memory="prefer", grants=(everything,))
    return ServerState(settings, development_keyring(backing="auto", require=False))


def new_audit_log(folder: Path) -> AuditLog:
    """Return an audit log in a file of a folder."""
    return AuditLog(Audit(str(folder / "audit.jsonl")))
