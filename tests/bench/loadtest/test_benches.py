"""`outrider bench overload`, `signals` and `attacks`: phases, goals and small runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.settings.simulation import Simulation
from outrider.v1 import draft_pb2, target_pb2
from outrider_bench.commands.bottlenecks import REGIMES, Point, Regime, goals, panels, sizes
from outrider_bench.commands.overload import OverloadOptions, at_capacity, beyond_capacity
from outrider_bench.commands.overload_phases import PhaseResult
from outrider_bench.commands.overload_phases import goals as overload_goals
from outrider_bench.commands.signals import SignalsOptions, Watch, measured_point
from outrider_bench.loadtest.driver import loaded_orchestrators
from outrider_bench.loadtest.records import Chunk, Record
from tests.bench.loadtest.conftest import simulated
from tests.cli.processes import run


def accepted(at: float, *, took: float = 1.0, num: int = 10) -> Record:
    chunks = [Chunk(at + took / 2, 1), Chunk(at + took, num - 1)]
    return Record(0, at, 4, sent_s=at, ended_s=at + took, chunks=chunks, status="OK")


def refused(at: float, *, after: float = 0.01) -> Record:
    fields: dict[str, Any] = {"status": "RESOURCE_EXHAUSTED", "retry_after_s": 0.5}
    return Record(0, at, 4, sent_s=at, ended_s=at + after, **fields)


def test_phase_result_counts_requests_after_the_settling_time() -> None:
    records = [accepted(0.0), accepted(2.0), accepted(3.0, took=2.0), refused(1.5), refused(2.5)]
    result = PhaseResult.of(
        "overload", [*records, replace(refused(3.0), status="INTERNAL")], 2.0, 4.0, 9.0
    )
    assert (result.num_accepted, result.num_refused, result.errors) == (2, 1, {"INTERNAL": 1})
    assert result.e2e_s == [1.0, 2.0]
    assert result.num_refused_with_hint == 1
    assert result.refused_after is not None
    assert result.refused_after.p50 == pytest.approx(0.01)
    # Only the second request ended in [2, 4), so only its ten tokens count.
    assert result.requests_per_s == 0.5
    assert result.tokens_per_s == 5.0


def test_goals_compare_with_the_peak() -> None:
    at = PhaseResult.of("capacity", [accepted(i / 10) for i in range(40)], 0.0, 4.0)
    slow = [accepted(i / 10, took=1.6) for i in range(40)]
    over = PhaseResult.of("overload", [*slow, *(refused(1.0) for _ in range(9))], 0.0, 4.0, 50.0)
    over.deaths.append("target died")
    goals_by_text = {goal.text: goal for goal in overload_goals([at, over])}
    ratio = goals_by_text["e2e p50 of accepted requests, over that at capacity"]
    assert ratio.got == pytest.approx(1.6)
    assert ratio.is_met is False
    assert goals_by_text["minimum tokens/s over the peak"].got == pytest.approx(
        over.tokens_per_s / at.tokens_per_s
    )
    assert goals_by_text["seconds until a rejection, p99"].is_met
    assert goals_by_text["rejections with a retry hint"].got == 1.0
    assert goals_by_text["programs that ended"].is_met is False
    assert goals_by_text["generations left open at the target"].is_met is None


async def test_overload_serves_some_requests_and_rejects_the_rest_with_a_hint(
    redis_url: str,
) -> None:
    options = OverloadOptions(generations=2, output_len="8", seconds=0.5, settle=0.0, prompt_len=4)
    async with simulated(redis_url, max_generations=2, max_waiting=1) as system:
        orchestrators = await loaded_orchestrators(system.channel)
        served = await at_capacity(options, orchestrators, 0, 0.5)
        capacity = PhaseResult.of("capacity", served.records, 0.0, 0.5)
        # Beyond what passes of 4 ms can do on any machine.
        offered = await beyond_capacity(options, orchestrators, 1, rate=800.0)
        over = PhaseResult.of("overload", offered.records, 0.0, 0.5)
    assert capacity.num_accepted > 0
    assert capacity.num_refused == 0
    assert over.num_accepted > 0
    assert over.num_refused > 0
    assert over.num_refused_with_hint == over.num_refused
    assert over.errors == capacity.errors == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_overload_writes_its_files(tmp_path: Path) -> None:
    quick = ("--quick", "--seconds=1.5", "--settle=0.5", f"--out={tmp_path}")
    ended = run("bench", "overload", *quick)
    assert ended.returncode == 0, ended.stderr
    document = json.loads((tmp_path / "overload.json").read_text("utf-8"))
    assert [r["name"] for r in document["results"]] == ["capacity", "overload", "afterwards"]
    assert [r["deaths"] for r in document["results"]] == [[], [], []]
    assert document["results"][-1]["num_left_open"] == 0
    assert document["goals"] == [], "a smoke test has none"
    assert (tmp_path / "overload.svg").exists()


def point(regime: Regime, targets: int, drafts: int, rate: float, **signals: float) -> Point:
    defaults: dict[str, Any] = {
        "draft_queue": 0.0,
        "hit_rate": 1.0,
        "waiting_rows": 0.0,
        "kv_use": 0.0,
    }
    return Point(
        regime=regime.name, num_targets=targets, num_drafts=drafts, num_sessions=1,
        tokens_per_s=rate, mean_gamma=2.0, errors={}, **(defaults | signals),
    )  # fmt: skip


def test_signals_are_relative_to_the_autoscaling_thresholds() -> None:
    """Late proposals weigh the draft queue up to twice; the larger target signal counts."""
    short = REGIMES[0]
    assert point(short, 1, 1, 1.0, draft_queue=8.0).draft_signal == 1.0
    assert point(short, 1, 1, 1.0, draft_queue=8.0, hit_rate=0.0).draft_signal == 2.0
    assert point(short, 1, 1, 1.0, waiting_rows=16.0).target_signal == 0.5
    assert point(short, 1, 1, 1.0, waiting_rows=16.0, kv_use=0.75).target_signal == 1.0


def test_goals_require_a_signal_exactly_where_replicas_help() -> None:
    """Goals of a regime that was not measured are neither met nor missed."""
    assert sizes(3) == [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]
    short = REGIMES[0]
    points = [
        point(short, 1, 1, 100.0, draft_queue=12.0),
        point(short, 1, 2, 150.0, draft_queue=2.0),
        point(short, 2, 1, 101.0, draft_queue=12.0),
    ]
    by_text = {goal.text: goal for goal in goals(points)}
    assert len(by_text) == 4 * len(REGIMES)
    own = {text: goal.is_met for text, goal in by_text.items() if text.startswith(short.name)}
    assert set(own.values()) == {True}
    assert by_text["draft short: tokens/s with a second draft"].got == 1.5
    assert by_text["target short: tokens/s with a second target"].is_met is None
    drawn = {line.name: line.ys for line in panels(points)[0].lines}
    assert drawn == {
        "draft short: more drafts": [1.0, 1.5],
        "draft short: more targets": [1.0, 1.01],
    }
    silent = goals([replace(points[0], draft_queue=0.0), *points[1:]])
    assert [g.text for g in silent if g.is_met is False] == [
        "draft short: signal of the draft over its threshold"
    ]


def test_regimes_are_valid_simulations() -> None:
    for regime in REGIMES:
        Simulation.parse(regime.target, is_draft=False)
        Simulation.parse(regime.draft)


async def test_measured_point_reads_the_counters_of_the_replicas(redis_url: str) -> None:
    # Short settling time: on a stalled machine the counters are read later, but still read.
    options = SignalsOptions(seconds=2.0, settle=0.1, output_len="16", prompt_len=4)
    regime = replace(REGIMES[0], num_sessions=3)
    async with simulated(redis_url) as system:

        async def target() -> Any:
            request = target_pb2.TargetServiceGetModelInfoRequest()
            return await system.target.GetModelInfo(request, timeout=10)

        async def draft() -> Any:
            assert system.draft is not None
            request = draft_pb2.DraftServiceGetModelInfoRequest()
            return await system.draft.GetModelInfo(request, timeout=10)

        seen = Watch([target], [draft])
        measured = await measured_point(options, regime, seen, system.channel, 0)
    assert (measured.num_targets, measured.num_drafts, measured.num_sessions) == (1, 1, 3)
    assert measured.tokens_per_s > 0
    assert len(seen.readings) >= 1
    assert 0 <= measured.kv_use < 1
    assert 0 <= measured.waiting_rows <= 3
    assert 0 <= measured.draft_queue <= 3
    assert 0 <= measured.hit_rate <= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_healthy_stream_continues_during_attacks(tmp_path: Path) -> None:
    attacks = "--attacks=burst,failing,fail-over"
    ended = run("bench", "attacks", "--quick", "--seconds=1", attacks, f"--out={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    document = json.loads((tmp_path / "attacks.json").read_text("utf-8"))
    assert [phase["ended"] for phase in document["results"]] == [None] * 9
