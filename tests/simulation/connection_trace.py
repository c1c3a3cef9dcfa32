"""One connection by the agent's system calls: received and sent bytes, and whether they were in order."""

import os
from typing import Any, NamedTuple

import msgpack

from .clients import Client
from .world import World

__all__ = ["AgentConnection", "Answer"]


class Answer(NamedTuple):
    """An answer that the agent has sent, and its time."""

    error: dict[str, Any] | None
    result: dict[str, Any] | None
    when: float

    @property
    def outcome(self) -> str:
        """`OK`, or the code of the error."""
        return str(self.error["Code"]) if self.error else "OK"

    @property
    def request_id(self) -> str:
        """The answer's RequestId."""
        return str((self.error or self.result or {}).get("RequestId"))


class AgentConnection:
    """The agent's end of a connection."""

    def __init__(self, world: World, client: Client, listener: str) -> None:
        self._world = world
        self.client = client
        self.listener = listener
        self.opened = world.now
        self.closed: float | None = None
        self.received = 0
        self._arrivals: list[tuple[int, float]] = []
        self.sent = bytearray()
        self.fault = ""
        """The connection's fault that the agent did not cause."""
        self.refused = self.silenced = False
        self.last_words = False
        self.answers: dict[int, Answer] = {}
        self._unpacker = msgpack.Unpacker(raw=False)
        self._process: int | None = None
        self.process_ended: float | None = None
        self._alive_until = 0
        """Bytes that had come when the process ended."""
        client.line = self
        world.all_connections.append(self)

    def __str__(self) -> str:
        return self.client.name

    @property
    def admitted(self) -> bool:
        """Whether it is open, and not refused."""
        return self.closed is None and not self.refused

    def arrived(self, end: int) -> float:
        """Return the time when the agent had received everything up to this byte."""
        return next((when for received, when in self._arrivals if received >= end), self._world.now)

    @property
    def being_closed(self) -> bool:
        """Whether a later connection may have displaced this one, which then ends at its next wait."""
        return not self._world.is_granted(self.client.uid, self._world.now) and bool(self._later())

    def could_make_room(self, other: "AgentConnection") -> bool:
        """Whether its caller has no grant, and no connection but the other has come since."""
        return not self._world.is_granted(self.client.uid, other.opened) and self._later() <= {other}

    def _later(self) -> "set[AgentConnection]":
        return {line for line in self._world.all_connections if line is not self and line.opened >= self.opened}

    @property
    def quiet(self) -> bool:
        """Whether all completely received requests are answered."""
        return all(msgid in self.answers for msgid, sent in self.client.asks.items() if sent.end <= self.received)

    @property
    def half_received(self) -> bool:
        """Whether the agent has received a part of a message only."""
        return self.received < self.client.sent or self.received not in self.client.boundaries

    def hold_process(self) -> int:
        """Return a descriptor that becomes readable when the process at the other end exits."""
        readable, self._process = os.pipe2(os.O_CLOEXEC)
        if self.client.process_ended:
            self.end_process()
        return readable

    def end_process(self) -> None:
        """End the process at the other end."""
        self.client.process_ended = True
        if self._process is not None:
            self.process_ended, self._alive_until = self._world.now, self.received
            os.close(self._process)
            self._process = None

    def on_received(self, data: bytes) -> None:
        """Trace bytes that the agent has received, and check the limits."""
        world = self._world
        self.received += len(data)
        self._arrivals.append((self.received, world.now))
        world.add_event("received", self, len(data))
        if self.refused:
            return
        together = [line for line in world.all_connections if line.admitted and line.received and not line.being_closed]
        of_user = [line for line in together if line.client.uid == self.client.uid]
        if len(together) > world.limits[0] or len(of_user) > world.limits[1]:
            world.report_violation(f"{len(together)} connections are served, {len(of_user)} of one user")

    def on_sent(self, data: bytes) -> None:
        """Trace bytes that the agent has sent, and check its answers."""
        self.sent += data
        self._world.add_event("sent", self, len(data))
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._answered(message)
        except Exception as error:  # the agent must not catch it
            self._world.report_violation(f"{self} was sent an invalid answer: {error!r}")

    def _answered(self, message: Any) -> None:
        kind, msgid, error, result = message
        world = self._world
        answer = Answer(error, result, world.now)
        world.add_event("answered", self, msgid, answer.outcome)
        if kind != 1 or (error is None) == (result is None) or self.last_words:
            world.report_violation(f"{self}: not one answer: {message!r}")
        if msgid is None:
            self.last_words = True
            self._refused(answer.outcome)
            return
        sent = self.client.asks.get(msgid)
        if sent is None or msgid in self.answers:
            world.report_violation(f"{self}: {msgid} is answered {'twice' if sent else 'and was never asked'}")
            return
        self.answers[msgid] = answer
        if self.process_ended is not None and sent.end > self._alive_until:
            world.report_violation(f"{self}: {msgid} is answered to whom its process has left")
        if sent.end > self.received:
            world.report_violation(f"{self}: {msgid} is answered before it was received")
        self._recorded(sent.ask.method, answer)

    def _refused(self, outcome: str) -> None:
        world = self._world
        if outcome == "ProtocolError":
            if self.client.garbage_at is None:
                world.report_violation(f"{self}: ProtocolError, and it was none")
            return
        if outcome == "Rejected.Throttling" and self.client.notifies and world.rate and self.received:
            self.silenced = True
            return
        self.refused = True
        # A round, and an audit log that hangs in it, may come between the accepting of a connection and its admission.
        others = [line for line in world.all_connections if line is not self and line.opened <= world.now]
        # One that was closed in the meantime may have been open when this one was judged.
        others = [line for line in others if not line.refused and (line.closed is None or line.closed >= self.opened)]
        of_user = [line for line in others if line.client.uid == self.client.uid]
        full = len(others) >= world.limits[0] or len(of_user) >= world.limits[1]
        if world.is_granted(self.client.uid, self.opened) and len(of_user) < world.limits[1]:
            there = [line for line in others if line.closed is None and line.opened < self.opened]
            if len(there) >= world.limits[0] and any(each.could_make_room(self) for each in there):
                world.report_violation(f"{self}: refused, and there is room that a caller without a grant has")
        struck = world.plan.injected["accept"] + world.plan.injected["hold the process"]
        without = world.starved or struck > 0 or world.was_starved
        if outcome != "Rejected.Throttling" or not (full or without):
            world.report_violation(f"{self}: refused with {outcome}, beside {len(others)} others")

    def _recorded(self, method: str, answer: Answer) -> None:
        """Check at an answer that its request is recorded with the same outcome, or logged as not recorded."""
        world = self._world
        fields = world.record.lines.get(answer.request_id)
        failed = answer.request_id in world.record.failed
        if answer.outcome == "ServiceUnavailableTemporary":
            if not failed or (fields is not None and not (world.record.hung or world.record.may_be_cut_off)):
                world.report_violation(f"{self}: {answer.outcome}, and its record did not fail")
        elif fields is None:
            # GetAgentStatus says that the record cannot be written, so it is answered then, too.
            if not failed or (world.on_failure != "serve" and method != "GetAgentStatus"):
                world.report_violation(f"{self}: an answer leaves, and its request is not recorded")
        elif fields["outcome"] != answer.outcome:
            world.report_violation(f"{self}: recorded as {fields['outcome']}, answered {answer.outcome}")
        if fields is not None:
            who = {"uid": self.client.uid, "pid": self.client.pid, "listener": self.listener}
            if {name: fields[name] for name in who} != who or (method and fields["operation"] != method):
                world.report_violation(f"{self}: recorded of {fields}")
