"""`outrider bench overload` and `outrider bench signals`: their phases and their arithmetic."""

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
from outrider_bench.loadtest.driver import subject
from outrider_bench.loadtest.records import Chunk, Record
from tests.bench.loadtest.conftest import simulated
from tests.cli.processes import run


def accepted(at: float, *, took: float = 1.0, num: int = 10) -> Record:
    chunks = [Chunk(at + took / 2, 1), Chunk(at + took, num - 1)]
    return Record(0, at, 4, sent_s=at, ended_s=at + took, chunks=chunks, status="OK")


def refused(at: float, *, after: float = 0.01) -> Record:
    told: dict[str, Any] = {"status": "RESOURCE_EXHAUSTED", "retry_after_s": 0.5}
    return Record(0, at, 4, sent_s=at, ended_s=at + after, **told)


def test_phase_result_counts_requests_after_the_settling_time() -> None:
    records = [accepted(0.0), accepted(2.0), accepted(3.0, took=2.0), refused(1.5), refused(2.5)]
    told = PhaseResult.of(
        "overload", [*records, replace(refused(3.0), status="INTERNAL")], 2.0, 4.0, 9.0
    )
    assert (told.num_accepted, told.num_refused, told.errors) == (2, 1, {"INTERNAL": 1})
    assert told.e2e_s == [1.0, 2.0]
    assert told.num_refused_with_hint == 1
    assert told.refused_after is not None
    assert told.refused_after.p50 == pytest.approx(0.01)
    # Only the second request ended in [2, 4), so only its ten tokens count.
    assert told.requests_per_s == 0.5
    assert told.tokens_per_s == 5.0


def test_goals_compare_with_the_peak() -> None:
    at = PhaseResult.of("capacity", [accepted(i / 10) for i in range(40)], 0.0, 4.0)
    slow = [accepted(i / 10, took=1.6) for i in range(40)]
    over = PhaseResult.of("overload", [*slow, *(refused(1.0) for _ in range(9))], 0.0, 4.0, 50.0)
    over.deaths.append("target died")
    told = {goal.text: goal for goal in overload_goals([at, over])}
    ratio = told["e2e p50 of accepted requests, over that at capacity"]
    assert ratio.got == pytest.approx(1.6)
    assert ratio.is_met is False
    assert told["minimum tokens/s over the peak"].got == pytest.approx(
        over.tokens_per_s / at.tokens_per_s
    )
    assert told["seconds until a rejection, p99"].is_met
    assert told["rejections with a retry hint"].got == 1.0
    assert told["programs that ended"].is_met is False
    assert told["generations left open at the target"].is_met is None


async def test_five_times_as_many_callers(redis_url: str) -> None:
    """Some are served, the rest sent away with a hint; nobody gets anything else."""
    options = OverloadOptions(generations=2, output_len="8", seconds=0.5, settle=0.0, prompt_len=4)
    async with simulated(redis_url, max_generations=2, max_waiting=1) as system:
        whom = await subject(system.channel)
        served = await at_capacity(options, whom, 0, 0.5)
        capacity = PhaseResult.of("capacity", served.records, 0.0, 0.5)
        # Beyond what passes of 4 ms can do on any machine.
        offered = await beyond_capacity(options, whom, 1, rate=800.0)
        over = PhaseResult.of("overload", offered.records, 0.0, 0.5)
    assert capacity.num_accepted > 0
    assert capacity.num_refused == 0
    assert over.num_accepted > 0
    assert over.num_refused > 0
    assert over.num_refused_with_hint == over.num_refused
    assert over.errors == capacity.errors == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_overload_leaves_its_files(tmp_path: Path) -> None:
    quick = ("--quick", "--seconds=1.5", "--settle=0.5", f"--out={tmp_path}")
    ended = run("bench", "overload", *quick)
    assert ended.returncode == 0, ended.stderr
    told = json.loads((tmp_path / "overload.json").read_text("utf-8"))
    assert [r["name"] for r in told["results"]] == ["capacity", "overload", "afterwards"]
    assert [r["deaths"] for r in told["results"]] == [[], [], []]
    assert told["results"][-1]["num_left_open"] == 0
    assert told["goals"] == [], "a smoke test has none"
    assert (tmp_path / "overload.svg").exists()


def point(regime: Regime, targets: int, drafts: int, rate: float, **signals: float) -> Point:
    told: dict[str, Any] = {"draft_queue": 0.0, "hit_rate": 1.0, "waiting_rows": 0.0, "kv_use": 0.0}
    return Point(
        regime=regime.name, num_targets=targets, num_drafts=drafts, num_sessions=1,
        tokens_per_s=rate, mean_gamma=2.0, errors={}, **(told | signals),
    )  # fmt: skip


def test_signals_are_those_of_the_autoscalers() -> None:
    """The draft's queue counts up to twice where proposals are late; the target's worst counts."""
    short = REGIMES[0]
    assert point(short, 1, 1, 1.0, draft_queue=8.0).draft_signal == 1.0
    assert point(short, 1, 1, 1.0, draft_queue=8.0, hit_rate=0.0).draft_signal == 2.0
    assert point(short, 1, 1, 1.0, waiting_rows=16.0).target_signal == 0.5
    assert point(short, 1, 1, 1.0, waiting_rows=16.0, kv_use=0.75).target_signal == 1.0


def test_a_signal_is_to_rise_where_more_replicas_help() -> None:
    """And only there; a regime that was not measured is told as such."""
    assert sizes(3) == [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]
    short = REGIMES[0]
    points = [
        point(short, 1, 1, 100.0, draft_queue=12.0),
        point(short, 1, 2, 150.0, draft_queue=2.0),
        point(short, 2, 1, 101.0, draft_queue=12.0),
    ]
    told = {goal.text: goal for goal in goals(points)}
    assert len(told) == 4 * len(REGIMES)
    own = {text: goal.is_met for text, goal in told.items() if text.startswith(short.name)}
    assert set(own.values()) == {True}
    assert told["draft short: tokens/s with a second draft"].got == 1.5
    assert told["target short: tokens/s with a second target"].is_met is None
    drawn = {line.name: line.ys for line in panels(points)[0].lines}
    assert drawn == {
        "draft short: more drafts": [1.0, 1.5],
        "draft short: more targets": [1.0, 1.01],
    }
    silent = goals([replace(points[0], draft_queue=0.0), *points[1:]])
    assert [g.text for g in silent if g.is_met is False] == [
        "draft short: signal of the draft over its threshold"
    ]


def test_regimes_are_tiers_that_can_be_simulated() -> None:
    for regime in REGIMES:
        Simulation.parse(regime.target, is_draft=False)
        Simulation.parse(regime.draft)


async def test_a_point_is_seen_by_the_replicas_own_counts(redis_url: str) -> None:
    # Hardly settled: what is not seen because the machine stalls for a second is seen after it.
    options = SignalsOptions(seconds=2.0, settle=0.1, output_len="16", prompt_len=4)
    regime = replace(REGIMES[0], num_sessions=3)
    async with simulated(redis_url) as system:

        async def target() -> Any:
            asked = target_pb2.TargetServiceGetModelInfoRequest()
            return await system.target.GetModelInfo(asked, timeout=10)

        async def draft() -> Any:
            assert system.draft is not None
            asked = draft_pb2.DraftServiceGetModelInfoRequest()
            return await system.draft.GetModelInfo(asked, timeout=10)

        seen = Watch([target], [draft])
        told = await measured_point(options, regime, seen, system.channel, 0)
    assert (told.num_targets, told.num_drafts, told.num_sessions) == (1, 1, 3)
    assert told.tokens_per_s > 0
    assert len(seen.readings) >= 1
    assert 0 <= told.kv_use < 1
    assert 0 <= told.waiting_rows <= 3
    assert 0 <= told.draft_queue <= 3
    assert 0 <= told.hit_rate <= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_healthy_stream_goes_on_beside_attacks(tmp_path: Path) -> None:
    attacks = "--attacks=burst,failing,fail-over"
    ended = run("bench", "attacks", "--quick", "--seconds=1", attacks, f"--out={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    told = json.loads((tmp_path / "attacks.json").read_text("utf-8"))
    assert [phase["ended"] for phase in told["results"]] == [None] * 9
