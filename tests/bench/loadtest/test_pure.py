"""Pure part of the load test: arrivals, lengths, latencies, plans, traces, search."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from outrider.errors import ConfigError
from outrider_bench.loadtest.arrivals import arrival_times
from outrider_bench.loadtest.campaign import LoadPattern, expected_s
from outrider_bench.loadtest.lengths import Lengths
from outrider_bench.loadtest.measures import (
    Distribution,
    Latencies,
    Summary,
    max_overlapping,
    mean_running,
    tokens_per_s,
)
from outrider_bench.loadtest.plan import (
    Conversation,
    Job,
    Workload,
    endless,
    prompt_ids,
    slices,
    timed,
    without_times,
)
from outrider_bench.loadtest.records import CUT, OK, Chunk, Record, Speculation
from outrider_bench.loadtest.slo import Slo
from outrider_bench.loadtest.sweep import highest_rate
from outrider_bench.loadtest.trace import read_trace

# Share of seeds for which a test would fail. Seeds are fixed: a test that passes always passes.
FALSE_ALARM = 1e-6


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def record(
    chunks: list[tuple[float, int]] | None = None,
    *,
    intended: float = 1.0,
    ended: float | None = None,
    status: str = OK,
    speculation: Speculation | None = None,
) -> Record:
    one = Record(0, intended, prompt_len=10, sent_s=intended + 0.25, status=status)
    one.chunks = [Chunk(at, num) for at, num in chunks or []]
    one.ended_s = ended if ended is not None else one.chunks[-1].at_s if one.chunks else None
    one.speculation = speculation
    return one


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    """With the requested shape and mean 1 / rate; shape 1 is the Poisson process."""
    times = arrival_times(20.0, 4_000, generator(), burstiness=burstiness)
    assert times[-1] == pytest.approx(4_000 / 20.0)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    expected = stats.gamma(burstiness, scale=1 / (20.0 * burstiness))
    assert stats.kstest(gaps, expected.cdf).pvalue > FALSE_ALARM
    other = stats.gamma(2 * burstiness, scale=1 / (20.0 * 2 * burstiness))
    assert stats.kstest(gaps, other.cdf).pvalue < FALSE_ALARM


def test_infinite_burstiness_gives_constant_gaps() -> None:
    times = arrival_times(4.0, 3, generator(), burstiness=math.inf)
    assert times.tolist() == [0.25, 0.5, 0.75]
    assert arrival_times(4.0, 0, generator()).tolist() == []


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.inf, 1), (1, 0)])
def test_invalid_rates_are_rejected(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match=r"--rate|--burstiness"):
        arrival_times(rate, 2, generator(), burstiness=burstiness)


def test_lengths_follow_their_distribution() -> None:
    assert Lengths.parse("17", "--f").draw(3, generator()) == [17] * 3
    uniform = Lengths.parse("uniform:3:6", "--f").draw(4_000, generator())
    assert stats.chisquare(np.bincount(uniform)[3:]).pvalue > FALSE_ALARM
    assert {min(uniform), max(uniform)} == {3, 6}
    lengths = np.array(Lengths.parse("lognormal:400:0.5", "--f").draw(4_000, generator()))
    expected = stats.lognorm(0.5, scale=400)
    assert (
        stats.kstest(lengths + generator(1).uniform(-0.5, 0.5, 4_000), expected.cdf).pvalue > 1e-6
    )
    bounded = Lengths.parse("lognormal:100:2:150", "--f").draw(500, generator())
    assert (min(bounded), max(bounded)) == (1, 150)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "x",
        "uniform:5",
        "uniform:9:3",
        "lognormal:5",
        "lognormal:9:1:3",
        "normal:1:1",
        "lognormal:inf:1",
        "lognormal:1e308:1",
    ],
)
def test_invalid_lengths_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-len"):
        Lengths.parse(text, "--output-len")


def test_latency_definitions() -> None:
    """Times count from the intended send time, 0.25 s before the actual one."""
    one = record([(1.5, 1), (2.0, 4), (2.3, 2)], ended=2.4)
    assert one.lateness_s == pytest.approx(0.25)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2e_s == pytest.approx(1.4)
    # Seven tokens, the first at 1.5, the last at 2.3.
    assert one.tpot_s == pytest.approx(0.8 / 6)
    assert one.chunk_gaps_s == pytest.approx([0.5, 0.3])
    assert one.token_gaps_s == pytest.approx([0.125] * 4 + [0.15] * 2)
    assert sum(one.token_gaps_s) == pytest.approx(sum(one.chunk_gaps_s))


def test_missing_tokens_have_no_latency() -> None:
    nothing = Record(0, 1.0, prompt_len=1)
    assert (nothing.status, nothing.num_tokens) == (CUT, 0)
    times = (nothing.ttft_s, nothing.tpot_s, nothing.e2e_s, nothing.chunk_gaps_s)
    assert times == (None, None, None, [])
    assert record([(2.0, 1)]).tpot_s is None
    # All tokens in one message: they came at once.
    assert record([(2.0, 8)]).tpot_s == 0.0


def test_percentiles_are_linear_between_neighbours() -> None:
    found = Distribution.of([float(i) for i in range(101)])
    assert found is not None
    assert found.percentiles == {50: 50.0, 90: 90.0, 95: 95.0, 99: 99.0}
    assert (found.num, found.mean) == (101, 50.0)
    two = Distribution.of([1.0, 3.0])
    assert two is not None
    assert two.percentiles == pytest.approx({50: 2.0, 90: 2.8, 95: 2.9, 99: 2.98})
    assert two.std == pytest.approx(1.0)
    assert Distribution.of([]) is None


def test_latencies_cover_answered_requests_only() -> None:
    slow = record([(90.0, 1)], status="DEADLINE_EXCEEDED")
    found = Latencies.of([record([(1.5, 1), (2.0, 1)]), slow])
    assert found.ttft is not None
    assert (found.ttft.num, found.ttft.p99) == (1, 0.5)
    assert Latencies.of([slow]).e2e is None


def test_summary_counts_each_request_once() -> None:
    refused = record(status="RESOURCE_EXHAUSTED", ended=1.01)
    cut = record([(2.0, 3)], status=CUT)
    summary = Summary.of(
        [record([(1.2, 1), (1.6, 3)]), record([(1.9, 1), (3.0, 1)]), refused, cut],
        10.0,
        Slo.parse("ttft=300ms"),
    )
    assert (summary.num_requests, summary.num_completed, summary.num_cut) == (4, 2, 1)
    assert summary.errors == {"RESOURCE_EXHAUSTED": 1}
    assert (summary.num_tokens, summary.tokens_per_s) == (9, 0.9)
    assert summary.requests_per_s == 0.2
    # One of the three that were answered, and the refused one was.
    assert summary.attained == pytest.approx(1 / 3)
    assert summary.goodput_per_s == pytest.approx(0.1)


def test_acceptance_counts_verified_draft_tokens_only() -> None:
    stats_of = Speculation(
        num_drafts=10, num_draft_tokens=50, num_accepted_tokens=30, num_rejected_tokens=8,
        num_lookahead_hits=9, num_accepted_per_pos=(10, 8, 6, 4, 2), draft_wait_s=1.0,
        num_rounds_per_gamma=(5, 0, 0, 0, 0, 10), verify_s=3.0, num_rows=4.0,
    )  # fmt: skip
    summary = Summary.of([record([(1.5, 1)], speculation=stats_of)] * 2, 1.0).drafting
    assert summary is not None
    assert summary.alpha == pytest.approx(30 / 38)
    assert summary.tau == pytest.approx(4.0)
    assert summary.mean_gamma == pytest.approx(50 / 15)
    assert summary.hit_rate == pytest.approx(0.9)
    assert summary.draft_wait_share == pytest.approx(0.25)
    assert summary.per_position == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2))
    plain = Summary.of([record([(1.5, 1)], speculation=Speculation())], 1.0).drafting
    assert plain is not None
    assert (plain.alpha, plain.tau, plain.hit_rate) == (None, None, None)


def test_rates_of_a_time_window() -> None:
    records = [record([(1.0, 1), (2.0, 5), (3.0, 7)]), record([(1.9, 2), (2.9, 4)])]
    assert tokens_per_s(records, 2.0, 3.0) == 9
    assert max_overlapping([(0, 2), (1, 3), (2, 4)]) == 2
    assert mean_running([(0, 2), (1, 3)], 1, 3) == pytest.approx(1.5)


def test_slo_is_parsed_and_checked() -> None:
    # Binary fractions: at the limit is within it.
    slo = Slo.parse("ttft=250ms, tpot=125ms,e2e=2s")
    assert (slo.ttft_s, slo.tpot_s, slo.e2e_s) == (0.25, 0.125, 2.0)
    good = [(1.25, 1), (1.375, 1)]
    assert slo.is_met(record(good))
    assert not slo.is_met(record([(1.26, 1), (1.375, 1)]))
    assert not slo.is_met(record([(1.25, 1), (1.38, 1)]))
    assert not slo.is_met(record(good, ended=3.1))
    assert not slo.is_met(record(good, status="UNAVAILABLE"))
    assert slo.is_met(record([(1.25, 1)]))  # one token has no time per token
    assert not Slo.parse("")


@pytest.mark.parametrize("text", ["ttft", "ttft=1", "ttft=-1s", "x=1s", "e2e=1s,e2e=2s", "tpot=1m"])
def test_invalid_slos_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        Slo.parse(text)


def workload(**changes: str) -> Workload:
    summary = {"input_len": "uniform:4:9", "output_len": "uniform:2:5", "num_turns": "1"} | changes
    return Workload(**{name: Lengths.parse(text, name) for name, text in summary.items()})


def test_plan_is_a_function_of_its_seeds() -> None:
    assert workload().conversations(20) == workload().conversations(20)
    one = timed(workload().conversations(20), 5.0, 1.0, seed=1)
    assert one == timed(workload().conversations(20), 5.0, 1.0, seed=1)
    assert one != timed(workload().conversations(20), 5.0, 1.0, seed=2)
    assert one[-1].at_s == pytest.approx(4.0)


def test_phases_have_different_prompts_of_the_same_lengths() -> None:
    job = Job(index=3, prompt_len=30, max_tokens=2)
    ordinary = np.arange(3, 99)
    assert prompt_ids(job, ordinary, 0, 1) == prompt_ids(job, ordinary, 0, 1)
    assert prompt_ids(job, ordinary, 0, 1) != prompt_ids(job, ordinary, 0, 2)
    ids = prompt_ids(job, ordinary, 0, 1)
    assert len(ids) == 30
    assert set(ids) <= set(range(3, 99))


def test_sessions_have_all_requests_in_turns() -> None:
    conversations = workload(num_turns="uniform:1:3").conversations(50)
    assert all(conversation.is_session for conversation in conversations)
    assert [job.index for conversation in conversations for job in conversation.jobs] == list(
        range(50)
    )
    assert {len(conversation.jobs) for conversation in conversations} == {1, 2, 3}
    assert not any(conversation.is_session for conversation in workload().conversations(5))
    # So many requests a second, whatever the number of turns.
    assert timed(conversations, 5.0, 1.0, 0)[-1].at_s == pytest.approx(10.0)


def test_times_of_each_slice_start_at_zero() -> None:
    jobs = [Job(i, 1, 1, not_before_s=float(i)) for i in range(5)]
    conversations = [Conversation((job,), at_s=job.not_before_s) for job in jobs]
    first, second = slices(conversations, 2)
    assert [conversation.at_s for conversation in first] == [0.0, 1.0]
    assert [conversation.at_s for conversation in second] == [0.0, 1.0, 2.0]
    assert [conversation.jobs[0].not_before_s for conversation in second] == [0.0, 1.0, 2.0]
    assert [conversation.jobs[0].index for conversation in second] == [2, 3, 4]
    assert all(conversation.at_s is None for conversation in without_times(conversations))
    assert len(slices(conversations, 9)) == 5


def test_endless_plan_continues_the_indices() -> None:
    conversations = itertools.islice(endless(workload().conversations(3)), 7)
    assert [conversation.jobs[0].index for conversation in conversations] == list(range(7))


def test_trace_keeps_times_and_turns(tmp_path: Path) -> None:
    """CSV and JSONL; the lines of a session are its turns, in order of time."""
    table = tmp_path / "t.csv"
    table.write_text(
        "timestamp,input_length,output_length,session_id,priority\n"
        "3000,5,6,,2\n1000,10,20,a,\n2000,30,40,a,\n"
    )
    lines = tmp_path / "t.jsonl"
    lines.write_text(
        '{"timestamp": 3000, "input_length": 5, "output_length": 6, "priority": 2}\n'
        '{"timestamp": 1000, "input_length": 10, "output_length": 20, "session_id": "a"}\n\n'
        '{"timestamp": 2000, "input_length": 30, "output_length": 40, "session_id": "a"}\n'
    )
    conversations = read_trace(table, speed=1000).conversations
    assert conversations == read_trace(lines, speed=1000).conversations
    assert [(v.at_s, v.is_session, len(v.jobs)) for v in conversations] == [
        (0.0, True, 2),
        (2.0, False, 1),
    ]
    second = conversations[0].jobs[1]
    assert (second.not_before_s, second.prompt_len, second.max_tokens) == (1.0, 30, 40)
    assert conversations[1].jobs[0].priority == 2
    assert len(read_trace(table, num_requests=1).conversations) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp": 1, "input_length": 4}', "output_length is missing"),
        ('{"timestamp": 1, "output_length": 4}', "either text or input_length"),
        ('{"timestamp": 1, "input_length": 4, "text": "x", "output_length": 4}', "either"),
        ('{"timestamp": "x", "input_length": 4, "output_length": 4}', "timestamp: 'x'"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 4}', "input_length: 0"),
        ('{"timestamp": 1, "input_length": 4, "output_length": 4, "n": 1}', "'n'; expected"),
        (
            '{"timestamp": 1, "input_length": 1' + "0" * 400 + ', "output_length": 4}',
            "not a number",
        ),
        (
            '{"timestamp": 1, "input_length": 4, "output_length": 4, "priority": 5e9}',
            "priority: 5e",
        ),
        ('{"timestamp": 1, "text": "\\ud800", "output_length": 4}', "text: "),
        ('{"timestamp": ' + "[" * 100_000, "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("", "no requests"),
    ],
)
def test_invalid_trace_is_rejected_with_the_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)
    with pytest.raises(ConfigError, match="nowhere"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_csv_with_byte_order_mark(tmp_path: Path) -> None:
    """With a text of any length."""
    path = tmp_path / "t.csv"
    text = "x" * 200_000
    path.write_text(f"timestamp,text,output_length\n1,{text},4\n", "utf-8-sig")
    (conversation,) = read_trace(path).conversations
    assert conversation.jobs[0].text == text
    path.write_text("timestamp,text,output_length\n1,x,4,5\n")
    with pytest.raises(ConfigError, match="line 2: more fields"):
        read_trace(path)
    path.write_text(
        "timestamp,text,output_length\n1,{text}{text},4\n".replace("{text}", "x" * 2_000_001)
    )
    with pytest.raises(ConfigError, match="field limit"):
        read_trace(path)


@pytest.mark.parametrize(("limit", "start"), [(10.0, 1.0), (10.0, 64.0), (0.3, 5.0), (7.9, 8.0)])
async def test_search_finds_the_limit(limit: float, start: float) -> None:
    probed: list[float] = []

    async def passes(rate: float) -> bool:
        probed.append(rate)
        return rate <= limit

    found = await highest_rate(passes, start, precision=0.1, max_probes=20)
    assert found.rate is not None
    assert found.bound is not None
    assert found.rate <= limit < found.bound <= 1.1 * found.rate * (1 + 1e-9)
    assert [rate for rate, _ in found.probes] == probed
    assert len(probed) <= 12
    few = await highest_rate(passes, start, max_probes=3)
    assert len(few.probes) == 3


async def test_search_without_a_passing_rate_ends() -> None:
    async def never(rate: float) -> bool:
        return False

    found = await highest_rate(never, 1.0, max_probes=50)
    assert found.rate is None
    assert len(found.probes) == 11


def timed_conversations(*times: float) -> list[Conversation]:
    return [Conversation((Job(i, 4, 4, not_before_s=at),), at) for i, at in enumerate(times)]


def test_expected_duration_of_a_comparison() -> None:
    """Trace: span of each slice. Rate: time to send. Closed loop: number of rounds."""
    trace = timed_conversations(0, 10, 100, 130)
    assert expected_s(2, trace, LoadPattern(), 1, 99.0) == 2 * 130
    assert expected_s(2, trace, LoadPattern(), 2, 99.0) == 2 * (10 + 30)
    late_turn = [
        Conversation((Job(0, 4, 4), Job(1, 4, 4, not_before_s=50.0)), 0.0, is_session=True)
    ]
    assert expected_s(1, late_turn, LoadPattern(), 1, None) == 50
    conversations = [Conversation((Job(i, 4, 4),)) for i in range(40)]
    assert expected_s(2, conversations, LoadPattern(rate=8.0), 2, 99.0) == 10
    assert expected_s(2, conversations, LoadPattern(num_clients=8), 1, 0.5) == 2 * 5 * 0.5
    assert expected_s(1, conversations, LoadPattern(num_clients=100), 2, 0.5) == 2 * 0.5
    assert expected_s(2, conversations, LoadPattern(num_clients=8), 1, None) is None
