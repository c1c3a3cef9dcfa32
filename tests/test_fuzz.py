"""What reads what others wrote keeps its promises (fuzz/targets): on every input that is kept, and on variations of them.

`make fuzz` goes on from here with a fuzzer that sees which branches an input reaches.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from fuzz import corpus
from fuzz.seeds import SEEDS
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from keyferry import sm2_ciphertext
from keyferry.files import stream
from keyferry.parameters import encode_base64
from keyferry.protocol import fast_reader, rpc
from keyferry_agent.authz.grants import Grant
from keyferry_agent.chained_log import chain
from keyferry_agent.config import table
from keyferry_agent.crypto import aad, ciphertext_blob, public_key
from keyferry_agent.gateway import head
from keyferry_agent.handlers import common
from keyferry_agent.keyring import document, recipients

EXAMPLES = 300
MOST_BYTES = 300_000

edits = st.lists(
    st.tuples(st.integers(0, 2**16), st.integers(0, 8), st.binary(max_size=8) | st.sampled_from([b"\0", b"\xff" * 4])),
    max_size=4,
)


def edited(data: bytes, at: int, removed: int, put: bytes) -> bytes:
    """Data with some bytes replaced, put in or taken out."""
    at %= len(data) + 1
    return data[:at] + put + data[at + removed :]


@pytest.mark.parametrize("target", TARGETS)
def test_every_promise_holds_on_the_corpus(target: str) -> None:
    """The fuzzer found each input of the corpus, and some inputs broke a promise once."""
    for path in corpus.kept(target):
        try:
            TARGETS[target].run(path.read_bytes())
        except Exception as error:
            error.add_note(f"with {path.relative_to(corpus.ROOT)}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_every_promise_holds_on_variations_of_the_corpus(target: str) -> None:
    """The variations differ in each run; a failing input is printed, so that it can join the corpus."""
    inputs = [path.read_bytes() for path in corpus.kept(target)]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    )
    @given(st.sampled_from(inputs), edits)
    def varied(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
        for change in changes:
            data = edited(data, *change)
        TARGETS[target].run(data[: TARGETS[target].longest])

    varied()


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "codec": (fast_reader, "MAX_DEPTH", 9),
    "agent": (common, "first_matching", lambda *_: Grant("", {}, (), ())),
    "answers": (rpc, "result_from_wire", lambda *_: None),
    "ciphertext": (ciphertext_blob, "associated_data", lambda header, *_: header),
    "context": (aad, "_with_length", lambda text: text),
    "sm2_ciphertext": (sm2_ciphertext, "_integer", lambda coordinate: b"\x02\x21\0" + coordinate),
    "public_key": (public_key, "_RSA_BITS", 4_096),
    "encrypted_file": (stream, "_nonce", lambda counter, **_: counter.to_bytes(12, "big")),
    "configuration": (table, "short_repr", lambda value: str(int(repr(value)))),
    "keyring": (document, "encode_base64", lambda data: encode_base64(bytes(data).upper())),
    "identity": (recipients, "_MAX_SHOWN", 4_096),
    "audit": (chain, "link", lambda _: chain.BEGINNING),
    "http": (head, "_FIELD", re.compile(b"([^:]+):[ \t]*(.*)")),
}
"""A planted fault for each target: a module, a name in it, and its replacement."""


@pytest.mark.parametrize("target", FAULTS)
def test_a_planted_fault_breaks_a_promise(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise and a corpus that miss a planted fault are worthless."""
    module, name, replacement = FAULTS[target]
    monkeypatch.setattr(module, name, replacement)
    broken = 0
    for path in corpus.kept(target):
        try:
            TARGETS[target].run(path.read_bytes())
        except Exception:
            broken += 1
    assert broken


def test_every_target_has_a_corpus_that_is_small() -> None:
    """Every run reads the whole corpus."""
    assert SEEDS.keys() == TARGETS.keys() == FAULTS.keys() == {folder.name for folder in corpus.CORPUS.iterdir()}
    assert sum(path.stat().st_size for target in TARGETS for path in corpus.kept(target)) < MOST_BYTES


def test_corpus_keeps_only_inputs_that_add_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named files stay; of the others, the smallest that add coverage are kept."""
    monkeypatch.setattr(corpus, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(corpus, "FOUND", tmp_path / "found")
    kept, found = tmp_path / "corpus" / "context", tmp_path / "found" / "context"
    for folder in (kept, found):
        folder.mkdir(parents=True)
    (kept / "broke-a-promise").write_bytes(b"{}")
    (kept / ("0" * 40)).write_bytes(b"{ }")
    for number, data in enumerate([b"{}  ", b'{"a":"b"}', b'{"a":"b","c":"d"}']):
        (found / str(number)).write_bytes(data)
    dropped, taken = corpus.grow("context", TARGETS["context"].run)
    assert (dropped, taken) == (1, 1)
    assert {path.read_bytes() for path in kept.iterdir()} == {b"{}", b'{"a":"b"}'}
