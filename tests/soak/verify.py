"""What is checked afterwards: every ciphertext opens to what it was made of, under its own context only; the record has each
answer once.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from keyferry import Client, KmsError, operations
from keyferry_agent.chained_log import chain

from .journal import Answer, CiphertextEntry, Journal, digest, read

__all__ = ["Opened", "Recorded", "check_record", "open_listeners"]

_AT_ONCE = 200
_UNDER_WAY = 256
"""Requests that may be recorded without an answer when an agent is killed: those that its clients had in flight."""


class Opened(NamedTuple):
    """The number of opened ciphertexts, and the faults of some of them."""

    tried: int
    wrong: list[str]


def open_listeners(kms: Client, journals: Sequence[Path], notes: Journal) -> Opened:
    """Open every ciphertext in journals with its context, and with another one. `notes` gets the answers."""
    count, wrong = 0, list[str]()
    for made in _batches(entry for entry in read([*journals]) if isinstance(entry, CiphertextEntry)):
        count += len(made)
        contexts = [each.context for each in made] + [{**each.context, "n": "another"} for each in made]
        outcomes = kms.pipeline(
            operations.Decrypt(ciphertext_blob=each.blob, encryption_context=context)
            for each, context in zip(made * 2, contexts, strict=True)
        )
        for outcome in outcomes:
            notes.answered("Decrypt", outcome, 0, 0)
        for each, right, other in zip(made, outcomes, outcomes[len(made) :], strict=False):
            if isinstance(right, KmsError):
                wrong.append(f"{each.blob[:60]}: {right}")
            elif (digest(right.plaintext), right.key_id, right.key_version_id) != each[2:]:
                wrong.append(f"{each.blob[:60]}: opened to something else")
            if not isinstance(other, KmsError) or other.code != "InvalidParameter":
                wrong.append(f"{each.blob[:60]}: under another context: {other}")
    return Opened(count, wrong)


def _batches(entries: Iterable[CiphertextEntry]) -> Iterator[list[CiphertextEntry]]:
    waiting = iter(entries)
    while batch := list(islice(waiting, _AT_ONCE)):
        yield batch


class Recorded(NamedTuple):
    """The audit log, compared with the clients' answers."""

    lines: int
    answered: int
    unanswered: int
    """Entries without an answer: the client or the agent was killed before it."""
    wrong: list[str]


def check_record(
    records: list[Path], journals: Sequence[Path], killed: Collection[int], cut: Sequence[str]
) -> Recorded:
    """Verify the record, and look for each answer in it. `killed`: process IDs of clients that were; `cut`: the record's last
    lines when an agent was.
    """
    lines = chain.verify(records).lines
    answers = Counter(entry.request_id for entry in read([*journals]) if isinstance(entry, Answer))
    wrong = [f"{answer}: answered {count} times" for answer, count in answers.items() if count > 1]
    ends = {chain.link(line.encode()) for line in cut}
    cut_at: list[int] = []
    unanswered: list[tuple[int, str, int]] = []
    seen: set[str] = set()
    for place, line in enumerate(chain.read(records)):
        if line["previous"] in ends:
            cut_at.append(place)
        if line["event"] != "audit":
            continue  # an agent's start, or the names of its keys
        request_id = line["request_id"]
        if request_id in seen:
            wrong.append(f"{request_id}: recorded twice")
        seen.add(request_id)
        if request_id not in answers:
            unanswered.append((place, request_id, line["pid"]))
    for place, request_id, pid in unanswered:
        if pid not in killed and not any(place < end <= place + _UNDER_WAY for end in cut_at):
            wrong.append(f"{request_id}: recorded, and nobody was answered")
    wrong += [f"{each}: answered, and not recorded" for each in answers.keys() - seen]
    return Recorded(lines, answers.total(), len(unanswered), wrong)
