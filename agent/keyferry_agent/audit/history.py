"""Puts the files of an audit log in order by their content, and finds where the log is incomplete.

Names and times can be wrong, so the chain decides: a file follows the file whose last entry its first entry holds the hash of.
Each file is read once, as a stream. Where files or entries do not fit together, all are read again, to find out why.
"""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from .chain import BEGINNING, link
from .reading import ChainError, Line, MovedError, entry, lines
from .rotated import File

__all__ = ["History", "Problem", "Tally", "moment"]

MAX_FAULTS: Final = 100
"""Faults of one file that are reported one by one."""
MAX_PLACES: Final = 8
"""Places of one hash that are remembered: only copies have several."""
_NEVER: Final = datetime.min.replace(tzinfo=UTC)

Tally: TypeAlias = Callable[[dict[str, Any], datetime | None], None]
"""Called with each entry of one file, and its time."""


class Problem(NamedTuple):
    """A reason why an audit log is incomplete. `healed`: entries from this time on are not affected; None: all may be.

    `older`: the first entry follows one that is in none of the files, as where log rotation has deleted old files.
    """

    text: str
    healed: datetime | None
    older: bool = False


@dataclass
class _Fault:
    """A line that does not fit. `held`: the hash that it has for the entry before it; None for a line that is not an entry."""

    number: int
    text: str
    held: str | None = None
    index: int = 0
    healed: datetime | None = None


@dataclass(eq=False)
class _Scan:
    """One file, as it was read."""

    file: File
    tally: Tally | None = None
    count: int = 0
    previous: str = ""
    first_line: int = 0
    last: str = ""
    begins: datetime | None = None
    ends: datetime | None = None
    faults: list[_Fault] = field(default_factory=list)
    omitted: int = 0
    moved: bool = False

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self) -> None:
        """Read the file, as far as it can be read."""
        unhealed: list[_Fault] = []
        try:
            for line in lines(self.path, self.file.identity):
                try:
                    fields = entry(self.path, line)
                except ChainError as error:
                    self._fault(unhealed, _Fault(line.number, str(error)))
                    continue
                if fields is None:
                    continue
                held, time = fields.get("previous"), moment(fields.get("time"))
                held = held if isinstance(held, str) else ""
                if not self.count:
                    self.previous, self.first_line, self.begins = held, line.number, time
                elif held != self.last:
                    self._fault(unhealed, _Fault(line.number, "", held, self.count))
                self.count, self.last, self.ends = self.count + 1, link(line.text), time
                if time is not None:
                    for fault in unhealed:
                        fault.healed = time
                    unhealed.clear()
                if self.tally is not None:
                    self.tally(fields, time)
        except (ChainError, OSError) as error:
            text = str(error) if isinstance(error, ChainError) else f"{self.path}: {error.strerror}"
            self._fault(unhealed, _Fault(0, text))
            self.moved = isinstance(error, MovedError)

    def _fault(self, unhealed: list[_Fault], fault: _Fault) -> None:
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)
        else:
            self.omitted += 1
            fault = self.faults[-1]
        fault.healed = None
        unhealed.append(fault)


class _Place(NamedTuple):
    """An entry: its file, its number among the entries of the file from 1 on, and its line."""

    scan: _Scan
    order: int
    line: int


class History:
    """An audit log, read from its files. `tally` makes a `Tally` for each file; `current` is the file that the agent writes."""

    def __init__(
        self,
        files: Iterable[File],
        *,
        problems: Iterable[str] = (),
        not_given: Iterable[str] = (),
        current: Path | None = None,
        tally: Callable[[], Tally] | None = None,
    ) -> None:
        scans = [_Scan(file, tally() if tally else None) for file in files]
        for scan in scans:
            scan.read()
        self.moved = any(scan.moved for scan in scans)
        """Whether a log rotation has exchanged files meanwhile: then the files have to be found again."""
        self.notes: list[str] = []
        self._places: dict[str, list[_Place]] = {}
        whole = [scan for scan in scans if scan.count]
        chains = _chains(whole)
        if len(chains) > 1 or any(fault.held is not None for scan in whole for fault in scan.faults):
            self._places = _locate(whole)
            chains = _chains(self._without_copies(whole))
        chains = self._connected(chains)
        self._scans = [scan for chain in chains for scan in chain]
        self._unreadable = [scan for scan in scans if not scan.count and scan.faults]
        self.files = [scan.path for scan in self._scans]
        """The files that have entries, oldest first."""
        self.count = sum(scan.count for scan in self._scans)
        self.last = self._scans[-1].last if self._scans else ""
        self.tallies = [scan.tally for scan in self._scans]
        self.beginning = bool(self._scans) and self._scans[0].previous == BEGINNING
        self.begins = self._scans[0].begins if self._scans else None
        self.ends = self._scans[-1].ends if self._scans else None
        self.problems = [*self._of_chains(chains), *self._of_files(problems, not_given, current)]
        if not self.count:
            self.problems.append(Problem("there is no line in it", None))

    @property
    def only_older_missing(self) -> bool:
        """Whether the chain is whole from its first entry, and nothing but entries before it is missing."""
        return bool(self.problems) and all(problem.older for problem in self.problems)

    @property
    def healed(self) -> datetime | None:
        """The time from which on no entry is missing, if there are problems; None if there is no such time."""
        times = [problem.healed for problem in self.problems]
        return None if None in times else max((time for time in times if time is not None), default=None)

    def is_complete(self, since: datetime | None = None) -> bool:
        """Whether no entry is missing, at all or since a time, between the first file's beginning and the last file's end."""
        healed = self.healed
        return not self.problems or (since is not None and healed is not None and healed <= since)

    def _of_chains(self, chains: Sequence[Sequence[_Scan]]) -> Iterable[Problem]:
        heads = {id(chain[0]): number for number, chain in enumerate(chains)}
        for rank, scan in enumerate(self._scans):
            number = heads.get(id(scan))
            if number is not None and (number or scan.previous != BEGINNING):
                text = self._why(scan.previous, rank, 0, oldest=not number)
                oldest = not number and scan.previous not in self._places
                yield Problem(f"{scan.path}, line {scan.first_line}: {text}", scan.begins, older=oldest)
            after = self._scans[rank + 1].begins if rank + 1 < len(self._scans) else None
            for place, fault in enumerate(scan.faults):
                text = fault.text
                if fault.held is not None:
                    text = f"{scan.path}, line {fault.number}: {self._why(fault.held, rank, fault.index)}"
                if scan.omitted and place + 1 == len(scan.faults):
                    text += f"; and {scan.omitted} more such lines"
                yield Problem(text, fault.healed or after)

    def _of_files(self, problems: Iterable[str], not_given: Iterable[str], current: Path | None) -> Iterable[Problem]:
        # The chain reaches from the first entry to the file that the agent writes: a file that cannot be read is older.
        continued = current is not None and bool(self._scans) and self._scans[-1].path == current
        older = self.begins if continued else None
        for scan in self._unreadable:
            yield Problem(scan.faults[0].text, older)
        for text in problems:
            yield Problem(text, older)
        for text in not_given:
            yield Problem(text, self.begins)

    def _why(self, held: str, rank: int, index: int, *, oldest: bool = False) -> str:
        """Return why an entry does not follow the one before it. `rank` and `index`: the place where it is."""
        if held == BEGINNING:
            return (
                "begins a new chain: the agent was started without the older entries, or a line was taken out or moved; "
                "entries between may be missing"
            )
        ranks = {id(each): number for number, each in enumerate(self._scans)}
        places = [place for place in self._places.get(held, []) if id(place.scan) in ranks]
        for place in places:
            there = f"{place.scan.path}, line {place.line}"
            if (ranks[id(place.scan)], place.order) <= (rank, index):
                return (
                    f"does not follow the line before it, but {there}, which another line follows: a fork; "
                    "two agents wrote to this audit log"
                )
            return f"does not follow the line before it, but {there}, a later one: a line was moved"
        if oldest:
            return (
                "the beginning of the audit log is missing: this line follows one that was not found. "
                "If older files are in another folder, name all files"
            )
        return (
            "does not follow the line before it, nor any other: a line was changed or taken out, or a file is missing"
        )

    def _without_copies(self, scans: Sequence[_Scan]) -> list[_Scan]:
        """Leave out each file whose entries are all in another file, too."""
        kept: list[_Scan] = []
        for scan in sorted(scans, key=lambda each: (-each.count, len(each.faults), each.file.optional)):
            original = next((other for other in kept if self._contains(other, scan)), None)
            if original is None:
                kept.append(scan)
            else:
                self.notes.append(f"{scan.path}: all its entries are in {original.path}, too; left out")
        return [scan for scan in scans if scan in kept]

    def _contains(self, other: _Scan, scan: _Scan) -> bool:
        starts = [place.order for place in self._places.get(scan.previous, []) if place.scan is other]
        if scan.previous == other.previous:
            starts.append(0)
        ends = [place.order for place in self._places.get(scan.last, []) if place.scan is other]
        return any(start + scan.count in ends for start in starts)

    def _connected(self, chains: Sequence[list[_Scan]]) -> list[list[_Scan]]:
        """Leave out chains of optional files only: another audit log with a similar name."""
        for chain in chains:
            if all(scan.file.optional for scan in chain):
                self.notes += [f"{scan.path}: not connected with this audit log; left out" for scan in chain]
        return [chain for chain in chains if not all(scan.file.optional for scan in chain)]


def moment(value: object) -> datetime | None:
    """Return an entry's time; None where it has none."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time


def _chains(scans: Iterable[_Scan]) -> list[list[_Scan]]:
    """Return the files as chains: each file follows the one before it. The chain that begins first comes first."""
    ordered = sorted(scans, key=_begins)
    followers: dict[str, list[_Scan]] = {}
    for scan in ordered:
        followers.setdefault(scan.previous, []).append(scan)
    ends = {scan.last for scan in ordered}
    chains: list[list[_Scan]] = []
    used: set[int] = set()
    for start in sorted(ordered, key=lambda scan: scan.previous in ends):  # files that follow another file come last
        chain: list[_Scan] = []
        following = [start]
        while following := [scan for scan in following if id(scan) not in used]:
            chain.append(following[0])
            used.add(id(following[0]))
            following = followers.get(following[0].last, [])
        if chain:
            chains.append(chain)
    return sorted(chains, key=lambda chain: (chain[0].previous in ends, _begins(chain[0])))


def _begins(scan: _Scan) -> datetime:
    return scan.begins or _NEVER


def _locate(scans: Collection[_Scan]) -> dict[str, list[_Place]]:
    """Read the files again, and return the places of the entries that other entries hold the hash of."""
    places: dict[str, list[_Place]] = {scan.last: [] for scan in scans}
    for scan in scans:
        for held in (scan.previous, *(fault.held for fault in scan.faults)):
            if held is not None:
                places[held] = []
    for scan in scans:
        if not os.path.isfile(scan.path):  # a pipe can be read once only
            continue
        index = 0
        try:
            for line in lines(scan.path, scan.file.identity):
                if _is_entry(scan.path, line):
                    index += 1
                    found = places.get(link(line.text))
                    if found is not None and len(found) < MAX_PLACES:
                        found.append(_Place(scan, index, line.number))
        except (ChainError, OSError):
            continue  # reported when it was read the first time
    return places


def _is_entry(path: Path, line: Line) -> bool:
    try:
        return entry(path, line) is not None
    except ChainError:
        return False
