"""The benchmark's arithmetic and tables, and that its bare loop does the agent's computation. Nothing is timed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import baselines, check, table
from bench.agent_under_test import AgentUnderTest, agent_under_test, requests
from bench.canned_server import answer_to
from bench.figures import Curve, Figure, Target, percentile, ratios
from bench.load import Connection, closed_loop_latencies, concurrent_rate, latencies_beside_greedy, open_loop
from hypothesis import given
from hypothesis import strategies as st

from keyferry.parameters import decode_base64
from keyferry.protocol import wire
from keyferry.secret import SecretMemory
from keyferry_agent.crypto import ciphertext_blob

ROOT = Path(__file__).parents[1]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.1, 100))
def test_percentile_is_the_nearest_rank(values: list[float], percent: float) -> None:
    """A percentile is always one of the values."""
    found = percentile(values, percent)
    enough = percent / 100 * len(values)
    assert found in values
    assert sum(value <= found for value in values) >= enough
    below = [value for value in values if value < found]
    assert len(below) < enough or not below


def test_percentiles_of_a_hundred_values_are_those_values() -> None:
    """Of the values 1 to 100, the 50th percentile is 50 and the 99th is 99."""
    values = list(range(100, 0, -1))
    assert [percentile(values, percent) for percent in (1, 50, 99, 100)] == [1, 50, 99, 100]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_ratios_are_computed_per_round() -> None:
    """Each round is divided by its own base, and rounds that do not pair are refused."""
    assert ratios([2.0, 9.0], [4.0, 3.0]) == [0.5, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def figure(*samples: float, target: Target | None = None, note: str = "") -> Figure:
    """A line of a table."""
    return Figure("Part", "a line", list(samples), absolute="1,234/s", target=target, note=note)


@pytest.mark.parametrize(
    ("target", "met"),
    [(Target("at least", 0.4), True), (Target("at least", 0.5), False), (Target("at most", 0.4), True), (None, None)],
)
def test_median_of_the_rounds_is_compared_with_the_target(target: Target | None, met: bool | None) -> None:
    """Neither the best round nor the mean counts; a median equal to the target meets it."""
    assert figure(0.9, 0.4, 0.1, target=target).met is met
    assert figure(0.9, 0.4, 0.1).spread == (0.1, 0.9)


def test_figures_and_curves_survive_their_json() -> None:
    """Figures and curves read from JSON are equal to those written."""
    for each in (figure(1.0, 2.0, target=Target("at least", 3)), figure()):
        assert Figure.from_json(json.loads(json.dumps(each.to_json()))) == each
    kept = {"plot": "p", "name": "n", "x": "x", "y": "y", "points": [{"x": 1, "samples": [2.0]}]}
    curve = Curve("p", "n", "x", "y")
    curve.add(1, [2.0])
    assert Curve.from_json(kept) == curve


def test_table_has_median_spread_target_and_gaps() -> None:
    """The table is printed in a terminal, or replaces the text between a page's marks and nothing else."""
    lines = [figure(0.25, 0.5, 1000.0, target=Target("at least", 0.6), note="a note"), figure(note="not there")]
    shown = table.text(lines)
    page = table.between_marks(
        f"before\n{table.MARKS[0]}\nold\n{table.MARKS[1]}\nafter", table.markdown(lines, ["N."], ["a/b.png"])
    )
    for wanted in ("0.5 × bare", "0.25 to 1,000", "1,234/s", "at least 0.6", "missed", "–", "a note", "not there"):
        assert wanted in shown, wanted
        assert wanted in page, wanted
    assert "![b](a/b.png)" in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    assert "old" not in page
    with pytest.raises(ValueError, match="no place"):
        table.between_marks("a page", "a table")


def test_the_page_has_a_place_for_the_table() -> None:
    """docs/performance.md has the marks that `make bench` looks for."""
    assert table.between_marks((ROOT / "docs" / "performance.md").read_text(), "a table").count("a table") == 1


@pytest.mark.parametrize(
    ("now", "kept", "found"),
    [
        (figure(0.2, target=Target("at least", 0.5)), figure(0.4), 1),
        (figure(0.3, target=Target("at least", 0.5)), figure(0.4), 0),
        (figure(0.5, target=Target("at least", 0.5)), figure(5.0), 0),
        (figure(9.0, target=Target("at most", 4)), figure(3.0), 1),
        (figure(9.0), figure(1.0), 0),
        (figure(target=Target("at most", 4)), figure(3.0), 0),
    ],
)
def test_only_large_regressions_past_the_target_are_reported(now: Figure, kept: Figure, found: int) -> None:
    """The direction of better depends on the figure."""
    assert len(check.worse([now], [kept])) == found


def test_bare_loop_does_the_agents_computation() -> None:
    """The baseline's blob opens as a CiphertextBlob, and its wrapped key is the blob's."""
    wrapped: list[bytes] = []

    def wrap(data_key: bytes) -> bytes:
        wrapped.append(data_key)
        return data_key

    blob, exported = baselines.bare(wrap, 48)()
    opened = bytearray(48)
    scratch, cmk = SecretMemory(4096, require=False), memoryview(bytearray(baselines.CMK))
    raw = decode_base64(blob.decode())
    ciphertext_blob.decrypt_into(
        "Aliyun_AES_256", cmk, raw, baselines.KEY_ID, baselines.CONTEXT, memoryview(opened), scratch
    )
    scratch.close()
    assert [bytes(opened)] == wrapped == [decode_base64(exported.decode())]


@pytest.mark.parametrize("loop", sorted(baselines.LOOPS))
def test_every_loop_can_be_repeated(loop: str) -> None:
    """Each baseline runs twice in a row."""
    step = baselines.LOOPS[loop](32)
    step()
    step()


@pytest.mark.parametrize("msgid", [0, 0x7F, 0x80, 0xFFFF, 1 << 16, wire.MAX_MSGID])
def test_the_canned_answer_has_the_request_s_message_id(msgid: int) -> None:
    """The answer has the request's message ID in any of its encoded lengths."""
    answer = answer_to(wire.encode_request(msgid, "X", {}), wire.encode_response(1 << 20, None, {"KeyId": "k"}))
    decoder = wire.Decoder()
    decoder.feed(answer)
    assert list(decoder.messages()) == [wire.Response(msgid, None, {"KeyId": "k"})]


@pytest.fixture(scope="module")
def measured() -> Iterator[AgentUnderTest]:
    """The agent as it is measured."""
    with agent_under_test(keys=2, grants=3) as agent:
        yield agent


def test_load_generators_leave_no_answer_unread(measured: AgentUnderTest) -> None:
    """A generator can follow another on one connection."""
    with (
        Connection(measured.path, requests(measured.aliases)) as line,
        Connection(measured.path, line.requests) as other,
    ):
        assert concurrent_rate([line, other], 1, 0) > 0
        assert concurrent_rate([line], 16, 0) > 0
        assert len(closed_loop_latencies(line, 0.001)) >= 1
        assert all(took > 0 for took in open_loop(line, 1_000, 0.02))
        assert len(latencies_beside_greedy(line, other, 0.001)) >= 1
        assert len(closed_loop_latencies(line, 0.001)) >= 1


def test_a_load_generator_notices_errors(measured: AgentUnderTest) -> None:
    """A refusal does not count as an answer."""
    with pytest.raises(ValueError, match="not the answer"):
        Connection(measured.path, requests(["alias/nothing"]))
