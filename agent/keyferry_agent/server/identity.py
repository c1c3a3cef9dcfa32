"""Confirms the identity of a connection's caller before each batch of its requests is decided.

A process can pass its socket to another process, end, or run another program. So the process is checked again each time. Its
program is checked again only if a grant depends on it, since another process has to inspect it (`peer.inspection`).
"""

from collections.abc import Callable
from typing import Final

import structlog

from ..authz.caller import Caller
from ..peer import Process, Program
from ..peer.inspection import Inspector
from ..state import ServerState

__all__ = ["Identity"]

_NO_SELECTORS: Final[frozenset[str]] = frozenset()

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Identity:
    """Keeps the evidence about a caller complete and current. `more_evidence` is called when evidence was added."""

    def __init__(
        self,
        agent: ServerState,
        inspector: Inspector,
        caller: Caller,
        process: Process | None,
        more_evidence: Callable[[], None],
    ) -> None:
        self._agent = agent
        self._inspector = inspector
        self._caller = caller
        self._process = process
        self._more_evidence = more_evidence
        self._program: Program | None = None
        self._inspected = _NO_SELECTORS
        """Selectors of grants for which the program was already inspected."""

    def confirm_at_once(self) -> bool | None:
        """Return the result of `confirm`, or None if the program has to be inspected first, which takes a while."""
        process, caller = self._process, self._caller
        caller.refresh(self._agent.policy)
        if process is None:
            return True
        if caller.granted.on_program or caller.granted.asks - self._inspected:
            return None
        return process.alive()  # checked last, after all evidence was read

    async def confirm(self) -> bool:
        """Collect all evidence that grants need. Return whether the peer's process lives and runs the same program as before.

        Call before each batch is decided, and again after each wait in it.
        """
        process, caller = self._process, self._caller
        caller.refresh(self._agent.policy)
        if process is None:
            return True
        selectors = caller.granted.asks - self._inspected
        if (selectors or caller.granted.on_program) and not await self._inspect(process, selectors):
            log.info("connection.program_changed", uid=caller.peer.uid, pid=caller.peer.pid)
            return False
        return process.alive()  # checked last, after all evidence was read

    async def _inspect(self, process: Process, selectors: frozenset[str]) -> bool:
        """Inspect the program, and add the findings to the evidence. Return False if the program has changed."""
        caller = self._caller
        program = await self._inspector.inspect(
            process, caller.peer.uid, self._agent.policy.users_by_program, with_hash="sha256" in selectors
        )
        self._inspected |= selectors
        if self._program is not None and not self._program.runs_in(program):
            return program is None and not caller.granted.on_program
        if selectors:
            self._program = self._program or program
            path, sha256 = (program.path, program.sha256) if program is not None else (None, None)
            caller.know(caller.peer._replace(exe=path, sha256=sha256 or caller.peer.sha256))
            caller.refresh(self._agent.policy)
            self._more_evidence()
        return True
