"""Orders the files of an audit log by their content, and finds where the log is incomplete.

Names and times can be wrong, so the chain decides. A file's first entry contains the hash of the last entry in the file before.
Each file is read once, as a stream. If files or entries do not fit together, all files are read again to find the cause.
"""

import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..chained_log.chain import BEGINNING, link
from ..chained_log.reading import ChainError, Line, entry, lines
from .rotated import File
from .scan import Scan, Tally

__all__ = ["Chain", "History", "Problem"]

MAX_PLACES: Final = 8
"""Places to remember for one hash. Only copies of a file cause several."""
_NEVER: Final = datetime.min.replace(tzinfo=UTC)


class Problem(NamedTuple):
    """A reason why an audit log is incomplete. `healed`: entries from this time on are not affected; None if all may be.

    `older`: only entries before the first one are missing, as after log rotation has deleted old files.
    """

    text: str
    healed: datetime | None
    older: bool = False


@dataclass
class Chain:
    """Entries that follow each other across files. `start`: the entry of the agent's start, for a chain in a stream."""

    start: Mapping[str, Any] | None
    begins: datetime | None
    ends: datetime | None
    count: int
    last: str
    whole: bool


class _Place(NamedTuple):
    """The place of an entry: its file, its number among the entries of the file (from 1), and its line."""

    scan: Scan
    order: int
    line: int


class History:
    """An audit log, read from its files. `tally` returns a `Tally` for each file; `current` is the file the agent writes."""

    def __init__(
        self,
        files: Iterable[File],
        *,
        problems: Iterable[str] = (),
        unnamed_files: Iterable[str] = (),
        current: Path | None = None,
        tally: Callable[[], Tally] | None = None,
    ) -> None:
        scans = [Scan(file, tally() if tally else None) for file in files]
        for scan in scans:
            scan.read()
        self.moved = any(scan.moved for scan in scans)
        """Whether a log rotation has renamed files meanwhile, so that the files have to be found again."""
        self.notes: list[str] = []
        self._places: dict[str, list[_Place]] = {}
        scans_with_entries = [scan for scan in scans if scan.count]
        chains = _chains(scans_with_entries)
        if len(chains) > 1 or any(fault.held is not None for scan in scans_with_entries for fault in scan.faults):
            self._places = _locate(scans_with_entries)
            chains = _chains(self._without_copies(scans_with_entries))
        chains = self._connected(chains)
        self.notes += [
            f"{scan.path}: skipped {scan.others} lines that are not audit entries"
            for scan in scans_with_entries
            if scan.others
        ]
        self._scans = [scan for chain in chains for scan in chain]
        self._unreadable = [scan for scan in scans if not scan.count and scan.faults]
        self._streams = any(_is_stream(scan) for scan in scans)
        self.chains = _joined(self._scans)
        """The chains, oldest first. An agent that writes to a stream begins a chain at each start."""
        self.files = [scan.path for scan in self._scans]
        """The files with entries, oldest first."""
        self.count = sum(scan.count for scan in self._scans)
        self.last = self._scans[-1].last if self._scans else ""
        self.tallies = [scan.tally for scan in self._scans]
        self.beginning = bool(self._scans) and self._scans[0].previous == BEGINNING
        self.begins = self._scans[0].begins if self._scans else None
        self.ends = self._scans[-1].ends if self._scans else None
        self.problems = [*self._of_chains(chains), *self._of_files(problems, unnamed_files, current)]
        if not self.count:
            self.problems.append(Problem("the audit log has no entry", None))

    @property
    def only_older_missing(self) -> bool:
        """Whether entries are missing, but only before the first entry, so that the chain is whole from there on."""
        return bool(self.problems) and all(problem.older for problem in self.problems)

    @property
    def healed(self) -> datetime | None:
        """The time from which on no entry is missing, if there are problems. None without problems or without such a time."""
        times = [problem.healed for problem in self.problems]
        return None if None in times else max((time for time in times if time is not None), default=None)

    def is_complete(self, since: datetime | None = None) -> bool:
        """Return whether no entry is missing (since a time, if given) between the first file's beginning and the last's end."""
        heal_time = self.healed
        return not self.problems or (since is not None and heal_time is not None and heal_time <= since)

    def _of_chains(self, chains: Sequence[Sequence[Scan]]) -> Iterable[Problem]:
        numbers = {id(chain[0]): number for number, chain in enumerate(chains)}
        for rank, scan in enumerate(self._scans):
            number = numbers.get(id(scan))
            if number is not None and scan.unstarted:
                text = "the entry of the agent's start is missing before this line: a line was removed or changed"
                yield Problem(f"{scan.path}, line {scan.first_line}: {text}", scan.begins)
            elif number is not None and not scan.is_started and (number or scan.previous != BEGINNING):
                text = self._why(scan.previous, rank, 0, is_oldest=not number)
                # Entries of a stream's chain are not deleted as a rule, so the chain has to be whole from its start entry.
                is_oldest = not number and scan.previous not in self._places and not self._streams
                yield Problem(f"{scan.path}, line {scan.first_line}: {text}", scan.begins, older=is_oldest)
            next_begin = self._scans[rank + 1].begins if rank + 1 < len(self._scans) else None
            for fault_index, fault in enumerate(scan.faults):
                text = fault.text
                if fault.held is not None:
                    text = f"{scan.path}, line {fault.number}: {self._why(fault.held, rank, fault.index)}"
                if scan.omitted and fault_index + 1 == len(scan.faults):
                    text += f"; and {scan.omitted} more such lines"
                yield Problem(text, fault.healed or next_begin)

    def _of_files(
        self, problems: Iterable[str], unnamed_files: Iterable[str], current: Path | None
    ) -> Iterable[Problem]:
        # If the chain reaches from the first entry to the file that the agent writes, an unreadable file must be older.
        is_continuous = current is not None and bool(self._scans) and self._scans[-1].path == current
        older_time = self.begins if is_continuous else None
        for scan in self._unreadable:
            yield Problem(scan.faults[0].text, older_time)
        for text in problems:
            yield Problem(text, older_time)
        for text in unnamed_files:
            yield Problem(text, self.begins)

    def _why(self, previous_hash: str, rank: int, index: int, *, is_oldest: bool = False) -> str:
        """Return why an entry does not follow the entry before it. `rank` and `index`: its file and its place in the file."""
        if previous_hash == BEGINNING:
            return (
                "begins a new chain: the agent was started without the older entries, or a line was removed or moved; "
                "entries between may be missing"
            )
        ranks = {id(scan): number for number, scan in enumerate(self._scans)}
        places = [place for place in self._places.get(previous_hash, []) if id(place.scan) in ranks]
        for place in places:
            location = f"{place.scan.path}, line {place.line}"
            if (ranks[id(place.scan)], place.order) <= (rank, index):
                return (
                    f"does not follow the line before it, but {location}, and another line follows that one, too: a fork; "
                    "two agents wrote to this audit log"
                )
            return f"does not follow the line before it, but a later one, {location}: a line was moved"
        if is_oldest:
            return (
                "the beginning of the audit log is missing: this line follows a line that was not found. "
                "If older files are in another folder, name all files"
            )
        return "does not follow the line before it, nor any other: a line was changed or removed, or a file is missing"

    def _without_copies(self, scans: Sequence[Scan]) -> list[Scan]:
        """Return the files without those whose entries are all in another file, too."""
        originals: list[Scan] = []
        for scan in sorted(
            scans, key=lambda candidate: (-candidate.count, len(candidate.faults), candidate.file.optional)
        ):
            other_scan = next((kept_scan for kept_scan in originals if self._contains(kept_scan, scan)), None)
            if other_scan is None:
                originals.append(scan)
            else:
                self.notes.append(f"{scan.path}: all its entries are also in {other_scan.path}; left out")
        return [scan for scan in scans if scan in originals]

    def _contains(self, other: Scan, scan: Scan) -> bool:
        start_orders = [place.order for place in self._places.get(scan.previous, []) if place.scan is other]
        if scan.previous == other.previous:
            start_orders.append(0)
        if scan.is_started:
            start_orders += [part.index for part in other.parts if part.start is not None]
        end_orders = [place.order for place in self._places.get(scan.last, []) if place.scan is other]
        return any(start + scan.count in end_orders for start in start_orders)

    def _connected(self, chains: Sequence[list[Scan]]) -> list[list[Scan]]:
        """Return the chains without those that have only optional files: these belong to another log with a similar name."""
        for chain in chains:
            if all(scan.file.optional for scan in chain):
                self.notes += [f"{scan.path}: not connected with this audit log; left out" for scan in chain]
        return [chain for chain in chains if not all(scan.file.optional for scan in chain)]


def _chains(scans: Iterable[Scan]) -> list[list[Scan]]:
    """Group the files into chains, in which each file follows the one before it. The chain that begins first comes first."""
    sorted_scans = sorted(scans, key=_begins)
    followers: dict[str, list[Scan]] = {}
    for scan in sorted_scans:
        followers.setdefault(scan.previous, []).append(scan)
    last_hashes = {scan.last for scan in sorted_scans}
    chains: list[list[Scan]] = []
    chained_ids: set[int] = set()
    for start in sorted(
        sorted_scans, key=lambda scan: scan.previous in last_hashes
    ):  # files that follow another one come last
        chain: list[Scan] = []
        successors = [start]
        while successors := [scan for scan in successors if id(scan) not in chained_ids]:
            chain.append(successors[0])
            chained_ids.add(id(successors[0]))
            successors = followers.get(successors[0].last, [])
        if chain:
            chains.append(chain)
    return sorted(chains, key=lambda chain: (chain[0].previous in last_hashes, _begins(chain[0])))


def _joined(scans: Iterable[Scan]) -> list[Chain]:
    """Join the parts of files into chains, in the files' order."""
    chains: list[Chain] = []
    for scan in scans:
        for part in scan.parts:
            if part.start is None and not part.index and chains and scan.previous == chains[-1].last:
                chain = chains[-1]
                chain.ends, chain.count, chain.last = part.ends, chain.count + part.count, part.last
                chain.whole = chain.whole and not part.broken
            else:
                has_start = part.start is not None or (scan.previous == BEGINNING and not scan.unstarted)
                is_whole = has_start and not part.broken
                chains.append(Chain(part.start, part.begins, part.ends, part.count, part.last, is_whole))
    return chains


def _is_stream(scan: Scan) -> bool:
    """Return whether an agent wrote a file as a stream: it contains stream starts or other lines, or is not a regular file."""
    if scan.others or any(part.start is not None for part in scan.parts):
        return True
    try:
        return scan.file.mixed and not stat.S_ISREG(os.stat(scan.path).st_mode)
    except OSError:
        return False


def _begins(scan: Scan) -> datetime:
    return scan.begins or _NEVER


def _locate(scans: Collection[Scan]) -> dict[str, list[_Place]]:
    """Read the files again, and return the places of entries by their hash, for the hashes that other entries contain."""
    places: dict[str, list[_Place]] = {scan.last: [] for scan in scans}
    for scan in scans:
        for previous_hash in (scan.previous, *(fault.held for fault in scan.faults)):
            if previous_hash is not None:
                places[previous_hash] = []
    for scan in scans:
        if not os.path.isfile(scan.path):  # a pipe can be read only once
            continue
        index = 0
        try:
            for line in lines(scan.path, scan.file.identity):
                if _is_entry(scan.path, line):
                    index += 1
                    hash_places = places.get(link(line.text))
                    if hash_places is not None and len(hash_places) < MAX_PLACES:
                        hash_places.append(_Place(scan, index, line.number))
        except (ChainError, OSError):
            continue  # the error was reported when the file was read the first time
    return places


def _is_entry(path: Path, line: Line) -> bool:
    try:
        return entry(path, line) is not None
    except ChainError:
        return False
