"""Reads one file of an audit log: checks how its entries follow each other, and notes the lines that do not fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from ..chained_log.chain import BEGINNING, link
from ..chained_log.reading import ChainError, Line, MovedError, OtherLineError, entry, lines
from .agent_entries import START
from .rotated import File

__all__ = ["Fault", "Part", "Scan", "Tally", "moment"]

MAX_FAULTS: Final = 100
"""Faults of one file that are reported one by one."""

Tally: TypeAlias = Callable[[dict[str, Any], datetime | None], None]
"""A function that is called with each entry of one file and the entry's time."""


@dataclass
class Fault:
    """A line that does not fit the chain.

    `held`: the hash in the line for the entry before it; None for a line that is not an entry. `index`: the number of entries
    in the file before it. `healed`: the time of the first entry with a time from there on; None if the file has no such entry.
    """

    number: int
    text: str
    held: str | None = None
    index: int = 0
    healed: datetime | None = None


@dataclass
class Part:
    """Entries of one file that belong to one chain.

    `start`: the entry of the agent's start if a stream's chain begins here.
    `index`: the number of entries in the file before them. `broken`: whether a line among them does not fit.
    """

    index: int
    start: Mapping[str, Any] | None
    begins: datetime | None
    ends: datetime | None = None
    count: int = 0
    last: str = ""
    broken: bool = False


@dataclass(eq=False)
class Scan:
    """One file and the findings from reading it."""

    file: File
    tally: Tally | None = None
    count: int = 0
    previous: str = ""
    first_line: int = 0
    last: str = ""
    begins: datetime | None = None
    ends: datetime | None = None
    parts: list[Part] = field(default_factory=list)
    others: int = 0
    """Lines that do not look like audit entries, in a file that may have such lines."""
    unstarted: bool = False
    """Whether the first entry begins a chain, but is not an agent's start although its agent writes start entries."""
    faults: list[Fault] = field(default_factory=list)
    omitted: int = 0
    moved: bool = False
    _other: Fault | None = None

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path

    @property
    def is_started(self) -> bool:
        """Whether the first entry is the start of an agent that writes to a stream."""
        return bool(self.parts) and self.parts[0].start is not None

    def read(self) -> None:
        """Read the file up to its end, or to an error, which is noted as a fault."""
        open_faults: list[Fault] = []
        try:
            for line in lines(self.path, self.file.identity):
                fields = self._entry(open_faults, line)
                if fields is None:
                    continue
                time = moment(fields.get("time"))
                self._follow(open_faults, fields, line.number, time)
                self.count, self.last, self.ends = self.count + 1, link(line.text), time
                part = self.parts[-1]
                part.count, part.last, part.ends = part.count + 1, self.last, time
                if time is not None:
                    for fault in open_faults:
                        fault.healed = time
                    open_faults.clear()
                if self.tally is not None:
                    self.tally(fields, time)
        except (ChainError, OSError) as error:
            text = str(error) if isinstance(error, ChainError) else f"{self.path}: {error.strerror}"
            self._fault(open_faults, Fault(0, text))
            self.moved = isinstance(error, MovedError)
        if self._other is not None and not self.count:
            self.faults.insert(0, self._other)

    def _entry(self, open_faults: list[Fault], line: Line) -> dict[str, Any] | None:
        try:
            return entry(self.path, line)
        except ChainError as error:
            fault = Fault(line.number, str(error))
            if self.file.mixed and isinstance(error, OtherLineError):
                self.others += 1
                self._other = self._other or fault
            else:
                self._fault(open_faults, fault)
        return None

    def _follow(self, open_faults: list[Fault], fields: Mapping[str, Any], number: int, time: datetime | None) -> None:
        """Check whether an entry follows the entry before it, or begins a chain, and note a fault if neither is so."""
        previous_hash = fields.get("previous")
        previous_hash = previous_hash if isinstance(previous_hash, str) else ""
        is_start = fields.get("event") == START
        # An agent that can read back its log continues the chain. So only in a stream, one chain can begin after another.
        stream = is_start and previous_hash == BEGINNING and fields.get("chain") == "stream" and self.file.mixed
        if stream or not self.count:
            self.parts.append(Part(self.count, fields if stream else None, time))
        if not self.count:
            self.previous, self.first_line, self.begins = previous_hash, number, time
            has_beginning = is_start and fields.get("chain") != "continued"
            self.unstarted = previous_hash == BEGINNING and "level" in fields and not has_beginning
        elif previous_hash != self.last and not stream:
            self._fault(open_faults, Fault(number, "", previous_hash, self.count))

    def _fault(self, open_faults: list[Fault], fault: Fault) -> None:
        if self.parts:
            self.parts[-1].broken = True
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)
        else:
            self.omitted += 1
            fault = self.faults[-1]
        fault.healed = None
        open_faults.append(fault)


def moment(value: object) -> datetime | None:
    """Parse an entry's time, as UTC if it has no time zone. Return None for any other value."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time
