"""The pure half of the load test: when requests come, how long they are, how times are called."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from outrider.errors import ConfigError
from outrider_bench.loadtest.arrivals import arrival_times
from outrider_bench.loadtest.campaign import Manner, expected_s
from outrider_bench.loadtest.lengths import Lengths
from outrider_bench.loadtest.measures import (
    Distribution,
    Latencies,
    Summary,
    mean_running,
    most_running,
    tokens_per_s,
)
from outrider_bench.loadtest.plan import (
    Job,
    Visit,
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

# Seeds are fixed: a test that passes passes always; this is the share of seeds that would not.
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
    made = Record(0, intended, prompt_len=10, sent_s=intended + 0.25, status=status)
    made.chunks = [Chunk(at, num) for at, num in chunks or []]
    made.ended_s = ended if ended is not None else made.chunks[-1].at_s if made.chunks else None
    made.speculation = speculation
    return made


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    """With the shape asked for and a mean of 1 / rate; 1 is the Poisson process."""
    times = arrival_times(20.0, 4_000, generator(), burstiness=burstiness)
    assert times[-1] == pytest.approx(4_000 / 20.0)
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    law = stats.gamma(burstiness, scale=1 / (20.0 * burstiness))
    assert stats.kstest(gaps, law.cdf).pvalue > FALSE_ALARM
    other = stats.gamma(2 * burstiness, scale=1 / (20.0 * 2 * burstiness))
    assert stats.kstest(gaps, other.cdf).pvalue < FALSE_ALARM


def test_a_clock_has_no_chance_in_it() -> None:
    times = arrival_times(4.0, 3, generator(), burstiness=math.inf)
    assert times.tolist() == [0.25, 0.5, 0.75]
    assert arrival_times(4.0, 0, generator()).tolist() == []


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.inf, 1), (1, 0)])
def test_rates_that_are_none_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match=r"--rate|--burstiness"):
        arrival_times(rate, 2, generator(), burstiness=burstiness)


def test_lengths_have_the_law_asked_for() -> None:
    assert Lengths.parse("17", "--f").draw(3, generator()) == [17] * 3
    uniform = Lengths.parse("uniform:3:6", "--f").draw(4_000, generator())
    assert stats.chisquare(np.bincount(uniform)[3:]).pvalue > FALSE_ALARM
    assert {min(uniform), max(uniform)} == {3, 6}
    drawn = np.array(Lengths.parse("lognormal:400:0.5", "--f").draw(4_000, generator()))
    law = stats.lognorm(0.5, scale=400)
    assert stats.kstest(drawn + generator(1).uniform(-0.5, 0.5, 4_000), law.cdf).pvalue > 1e-6
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
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-len"):
        Lengths.parse(text, "--output-len")


def test_times_are_those_of_the_field() -> None:
    """From the intended send time, 0.25 s before it was really sent."""
    made = record([(1.5, 1), (2.0, 4), (2.3, 2)], ended=2.4)
    assert made.lateness_s == pytest.approx(0.25)
    assert made.ttft_s == pytest.approx(0.5)
    assert made.e2e_s == pytest.approx(1.4)
    # Seven tokens, the first at 1.5, the last at 2.3.
    assert made.tpot_s == pytest.approx(0.8 / 6)
    assert made.chunk_gaps_s == pytest.approx([0.5, 0.3])
    assert made.token_gaps_s == pytest.approx([0.125] * 4 + [0.15] * 2)
    assert sum(made.token_gaps_s) == pytest.approx(sum(made.chunk_gaps_s))


def test_what_did_not_come_has_no_time() -> None:
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


def test_latencies_are_of_the_answered() -> None:
    slow = record([(90.0, 1)], status="DEADLINE_EXCEEDED")
    found = Latencies.of([record([(1.5, 1), (2.0, 1)]), slow])
    assert found.ttft is not None
    assert (found.ttft.num, found.ttft.p99) == (1, 0.5)
    assert Latencies.of([slow]).e2e is None


def test_a_summary_counts_everybody_once() -> None:
    refused = record(status="RESOURCE_EXHAUSTED", ended=1.01)
    cut = record([(2.0, 3)], status=CUT)
    told = Summary.of(
        [record([(1.2, 1), (1.6, 3)]), record([(1.9, 1), (3.0, 1)]), refused, cut],
        10.0,
        Slo.parse("ttft=300ms"),
    )
    assert (told.num_requests, told.num_completed, told.num_cut) == (4, 2, 1)
    assert told.errors == {"RESOURCE_EXHAUSTED": 1}
    assert (told.num_tokens, told.tokens_per_s) == (9, 0.9)
    assert told.requests_per_s == 0.2
    # One of the three that were answered, and the refused one was.
    assert told.attained == pytest.approx(1 / 3)
    assert told.goodput_per_s == pytest.approx(0.1)


def test_acceptance_is_of_judged_draft_tokens() -> None:
    stats_of = Speculation(
        num_drafts=10, num_draft_tokens=50, num_accepted_tokens=30, num_rejected_tokens=8,
        num_lookahead_hits=9, num_accepted_per_pos=(10, 8, 6, 4, 2), draft_wait_s=1.0,
        num_rounds_per_gamma=(5, 0, 0, 0, 0, 10), verify_s=3.0, num_rows=4.0,
    )  # fmt: skip
    told = Summary.of([record([(1.5, 1)], speculation=stats_of)] * 2, 1.0).drafting
    assert told is not None
    assert told.alpha == pytest.approx(30 / 38)
    assert told.tau == pytest.approx(4.0)
    assert told.mean_gamma == pytest.approx(50 / 15)
    assert told.hit_rate == pytest.approx(0.9)
    assert told.draft_wait_share == pytest.approx(0.25)
    assert told.per_position == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2))
    plain = Summary.of([record([(1.5, 1)], speculation=Speculation())], 1.0).drafting
    assert plain is not None
    assert (plain.alpha, plain.tau, plain.hit_rate) == (None, None, None)


def test_rates_are_of_a_window() -> None:
    records = [record([(1.0, 1), (2.0, 5), (3.0, 7)]), record([(1.9, 2), (2.9, 4)])]
    assert tokens_per_s(records, 2.0, 3.0) == 9
    assert most_running([(0, 2), (1, 3), (2, 4)]) == 2
    assert mean_running([(0, 2), (1, 3)], 1, 3) == pytest.approx(1.5)


def test_a_promise_is_read_and_kept() -> None:
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
def test_promises_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        Slo.parse(text)


def workload(**changes: str) -> Workload:
    told = {"input_len": "uniform:4:9", "output_len": "uniform:2:5", "num_turns": "1"} | changes
    return Workload(**{name: Lengths.parse(text, name) for name, text in told.items()})


def test_a_plan_is_its_seeds() -> None:
    assert workload().visits(20) == workload().visits(20)
    one = timed(workload().visits(20), 5.0, 1.0, seed=1)
    assert one == timed(workload().visits(20), 5.0, 1.0, seed=1)
    assert one != timed(workload().visits(20), 5.0, 1.0, seed=2)
    assert one[-1].at_s == pytest.approx(4.0)


def test_phases_have_prompts_of_the_same_lengths_but_not_the_same() -> None:
    job = Job(index=3, prompt_len=30, max_tokens=2)
    ordinary = np.arange(3, 99)
    assert prompt_ids(job, ordinary, 0, 1) == prompt_ids(job, ordinary, 0, 1)
    assert prompt_ids(job, ordinary, 0, 1) != prompt_ids(job, ordinary, 0, 2)
    ids = prompt_ids(job, ordinary, 0, 1)
    assert len(ids) == 30
    assert set(ids) <= set(range(3, 99))


def test_sessions_have_all_requests_in_turns() -> None:
    visits = workload(num_turns="uniform:1:3").visits(50)
    assert all(visit.is_session for visit in visits)
    assert [job.index for visit in visits for job in visit.jobs] == list(range(50))
    assert {len(visit.jobs) for visit in visits} == {1, 2, 3}
    assert not any(visit.is_session for visit in workload().visits(5))
    # So many requests a second, whatever the number of turns.
    assert timed(visits, 5.0, 1.0, 0)[-1].at_s == pytest.approx(10.0)


def test_slices_begin_anew() -> None:
    jobs = [Job(i, 1, 1, not_before_s=float(i)) for i in range(5)]
    visits = [Visit((job,), at_s=job.not_before_s) for job in jobs]
    first, second = slices(visits, 2)
    assert [visit.at_s for visit in first] == [0.0, 1.0]
    assert [visit.at_s for visit in second] == [0.0, 1.0, 2.0]
    assert [visit.jobs[0].not_before_s for visit in second] == [0.0, 1.0, 2.0]
    assert [visit.jobs[0].index for visit in second] == [2, 3, 4]
    assert all(visit.at_s is None for visit in without_times(visits))
    assert len(slices(visits, 9)) == 5


def test_an_endless_plan_counts_on() -> None:
    visits = itertools.islice(endless(workload().visits(3)), 7)
    assert [visit.jobs[0].index for visit in visits] == list(range(7))


def test_a_trace_keeps_its_times_and_turns(tmp_path: Path) -> None:
    """CSV and JSONL alike; a session's lines are its turns, in order of time."""
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
    visits = read_trace(table, speed=1000).visits
    assert visits == read_trace(lines, speed=1000).visits
    assert [(v.at_s, v.is_session, len(v.jobs)) for v in visits] == [
        (0.0, True, 2),
        (2.0, False, 1),
    ]
    second = visits[0].jobs[1]
    assert (second.not_before_s, second.prompt_len, second.max_tokens) == (1.0, 30, 40)
    assert visits[1].jobs[0].priority == 2
    assert len(read_trace(table, num_requests=1).visits) == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"timestamp": 1, "input_length": 4}', "output_length is missing"),
        ('{"timestamp": 1, "output_length": 4}', "either text or input_length"),
        ('{"timestamp": 1, "input_length": 4, "text": "x", "output_length": 4}', "either"),
        ('{"timestamp": "x", "input_length": 4, "output_length": 4}', "timestamp: 'x'"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 4}', "input_length: 0"),
        ('{"timestamp": 1, "input_length": 4, "output_length": 4, "n": 1}', "'n'; expected"),
        ('{"timestamp": 1, "input_length": 1' + "0" * 400 + ', "output_length": 4}', "no number"),
        (
            '{"timestamp": 1, "input_length": 4, "output_length": 4, "priority": 5e9}',
            "priority: 5e",
        ),
        ('{"timestamp": 1, "text": "\\ud800", "output_length": 4}', "text: "),
        ('{"timestamp": ' + "[" * 100_000, "no JSON object"),
        ("[1]", "no JSON object"),
        ("", "no requests"),
    ],
)
def test_a_trace_that_is_none_is_refused_by_line(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=named):
        read_trace(path)
    with pytest.raises(ConfigError, match="nowhere"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_a_table_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """With a mark before its first name, and a text of any length."""
    path = tmp_path / "t.csv"
    text = "x" * 200_000
    path.write_text(f"timestamp,text,output_length\n1,{text},4\n", "utf-8-sig")
    (visit,) = read_trace(path).visits
    assert visit.jobs[0].text == text
    path.write_text("timestamp,text,output_length\n1,x,4,5\n")
    with pytest.raises(ConfigError, match="line 2: more fields"):
        read_trace(path)
    path.write_text(
        "timestamp,text,output_length\n1,{text}{text},4\n".replace("{text}", "x" * 2_000_001)
    )
    with pytest.raises(ConfigError, match="field limit"):
        read_trace(path)


@pytest.mark.parametrize(("limit", "start"), [(10.0, 1.0), (10.0, 64.0), (0.3, 5.0), (7.9, 8.0)])
async def test_a_search_finds_the_limit(limit: float, start: float) -> None:
    tried: list[float] = []

    async def passes(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = await highest_rate(passes, start, precision=0.1, max_probes=20)
    assert found.rate is not None
    assert found.bound is not None
    assert found.rate <= limit < found.bound <= 1.1 * found.rate * (1 + 1e-9)
    assert [rate for rate, _ in found.probes] == tried
    assert len(tried) <= 12
    few = await highest_rate(passes, start, max_probes=3)
    assert len(few.probes) == 3


async def test_a_search_for_what_is_not_ends() -> None:
    async def never(rate: float) -> bool:
        return False

    found = await highest_rate(never, 1.0, max_probes=50)
    assert found.rate is None
    assert len(found.probes) == 11


def timed_visits(*times: float) -> list[Visit]:
    return [Visit((Job(i, 4, 4, not_before_s=at),), at) for i, at in enumerate(times)]


def test_how_long_a_comparison_takes() -> None:
    """A trace: its own span, of each slice. A rate: that of the requests. A closed loop: rounds."""
    trace = timed_visits(0, 10, 100, 130)
    assert expected_s(2, trace, Manner(), 1, 99.0) == 2 * 130
    assert expected_s(2, trace, Manner(), 2, 99.0) == 2 * (10 + 30)
    late_turn = [Visit((Job(0, 4, 4), Job(1, 4, 4, not_before_s=50.0)), 0.0, is_session=True)]
    assert expected_s(1, late_turn, Manner(), 1, None) == 50
    visits = [Visit((Job(i, 4, 4),)) for i in range(40)]
    assert expected_s(2, visits, Manner(rate=8.0), 2, 99.0) == 10
    assert expected_s(2, visits, Manner(num_callers=8), 1, 0.5) == 2 * 5 * 0.5
    assert expected_s(1, visits, Manner(num_callers=100), 2, 0.5) == 2 * 0.5
    assert expected_s(2, visits, Manner(num_callers=8), 1, None) is None
