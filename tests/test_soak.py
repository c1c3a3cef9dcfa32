"""The soak's verification: lost ciphertexts, lost and invented entries, and growing figures are found."""

from pathlib import Path
from typing import Any

import pytest
from soak.figures import Sample, compare, not_flat, table
from soak.journal import Answer, CiphertextEntry, Journal, Violation, digest, read
from soak.verify import check_record, open_listeners
from soak.workload import Workload
from support.agent import RunningAgent
from support.keys import recipient

from keyferry import KmsError
from keyferry.parameters import encode_base64
from keyferry_agent.audit import AuditLog
from keyferry_agent.audit.entry import AuditedRequest, AuditEntry
from keyferry_agent.config.settings import Audit
from keyferry_agent.peer import Peer

TEXT = b"what it was made of"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A journal."""
    return tmp_path / "client.jsonl"


def test_journal_keeps_all_whole_lines(notes: Path) -> None:
    """The writer of a journal may be killed at any moment, so the last line may be partial."""
    entries: list[Answer | CiphertextEntry | Violation] = [
        Answer("id", "Decrypt", 1.5, 0.25, "OK"),
        CiphertextEntry("b", {"k": "v"}, "d", "key", "version"),
        Violation("this"),
    ]
    with Journal(notes) as journal:
        for entry in entries:
            journal.write(entry)
    with notes.open("a") as file:
        file.write('["Answer", "cut o')
    assert list(read([notes])) == entries


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, ""),
        ({"plaintext": digest(b"another")}, "opened to something else"),
        ({"key_id": "another"}, "opened to something else"),
        ({"version": "another"}, "opened to something else"),
        ({"context": {"n": "another"}}, "Decrypt"),
        ({"blob": encode_base64(bytes(200))}, "Forbidden"),
    ],
)
def test_verification_finds_a_wrong_plaintext(
    agent: RunningAgent, notes: Path, change: dict[str, Any], wrong: str
) -> None:
    """A ciphertext that opens under another context is found, too."""
    with agent.client() as kms, Journal(notes) as journal, Journal(notes.with_name("checks")) as checks:
        sealed = kms.encrypt(key_id="alias/dev", plaintext=encode_base64(TEXT), encryption_context={"n": "1"})
        made = CiphertextEntry(sealed.ciphertext_blob, {"n": "1"}, digest(TEXT), sealed.key_id, sealed.key_version_id)
        journal.write(made)
        journal.write(made._replace(**change))
        opened = open_listeners(kms, [notes], checks)
    assert opened.tried == 2
    assert bool(opened.wrong) == bool(wrong)
    assert all(wrong in each or "Invalid" in each for each in opened.wrong)
    assert len(list(read([notes.with_name("checks")]))) == 4


def test_verification_finds_missing_answers_and_entries(tmp_path: Path, notes: Path) -> None:
    """Requests in flight during a kill of the client or the agent are exempt."""
    record = tmp_path / "audit.jsonl"
    audit = AuditLog(Audit(str(record)))
    for number, pid in enumerate((1, 1, 2, 1)):
        peer = Peer(uid=1, gids=frozenset(), pid=pid, listener="default")
        audit.record([AuditedRequest(peer, f"id{number}", 0.0, AuditEntry("Decrypt"), "OK")])
    lines = record.read_text().splitlines()
    noted(notes, "id0", "id3")
    assert check_record([record], [notes], {2}, [lines[1]]) == (4, 2, 2, [])
    assert check_record([record], [notes], {2}, [])[3] == ["id1: recorded, and nobody was answered"]
    assert check_record([record], [notes], (), [lines[1]])[3] == ["id2: recorded, and nobody was answered"]
    noted(notes, "id3", "id4")
    found = check_record([record], [notes], {2}, [lines[1]])[3]
    assert found == ["id3: answered 2 times", "id4: answered, and not recorded"]


def noted(notes: Path, *ids: str) -> None:
    """Note answers."""
    with Journal(notes) as journal:
        for request_id in ids:
            journal.write(Answer(request_id, "Decrypt", 0, 0, "OK"))


@pytest.mark.parametrize(
    ("name", "grow"),
    [
        ("resident memory", lambda s: s._replace(resident=s.resident + 2**20 * s.at)),
        ("descriptors", lambda s: s._replace(descriptors=s.descriptors + s.at // 4)),
        ("slow calls, 50 %", lambda s: s._replace(slow=tuple(each * (1 + s.at) for each in s.slow))),
        (None, lambda s: s),
    ],
)
def test_growth_of_a_figure_is_reported(name: str | None, grow: object) -> None:
    """Medians of thirds are compared, so a single outlier is not growth."""
    assert callable(grow)
    samples = [Sample(at, 50 * 2**20, 20, 6, (0.001, 0.002), (0.002, 0.003)) for at in range(30)]
    samples[25] = samples[25]._replace(resident=2**30)
    figures = compare([grow(sample) for sample in samples])
    assert table(figures).count("\n") == 2 + len(figures) - 1
    found = not_flat(figures)
    assert (found == []) if name is None else any(name in each for each in found)


def test_workload_covers_all_operations_and_notes_failures(agent: RunningAgent, notes: Path) -> None:
    """An agent with none of the workload's keys fails every request that should succeed."""
    operations = set()
    with agent.client() as kms, Journal(notes) as journal:
        asked = Workload(1, recipient("SM2PKE"), journal).requests()
        request = next(asked)
        for _ in range(100):
            operations.add(request[0] if type(request) is tuple else type(request).__name__)
            (outcome,) = kms.pipeline([request])
            assert isinstance(outcome, KmsError) or outcome.request_id
            request = asked.send(outcome)
    assert {"GenerateAndExportDataKey", "Encrypt", "GenerateDataKey", "DescribeKey", "Explode"} <= operations
    assert any("Forbidden.AliasNotFound" in each.what for each in read([notes]) if isinstance(each, Violation))
