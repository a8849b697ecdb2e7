"""Faults, requests and client behaviour of a chaos run are functions of its seed."""

from __future__ import annotations

import itertools

import pytest

from outrider.errors import ConfigError
from outrider_bench.chaos.faults import (
    FAULTS,
    QUICK_FAULTS,
    Fault,
    FaultKind,
    Tier,
    parse_faults,
    schedule,
)
from outrider_bench.chaos.jobs import ClientBehaviour, Job, SamplingMethod, make_cases, make_jobs


def faults(seed: int, num: int, names: tuple[str, ...] = FAULTS) -> list[Fault]:
    endless = schedule(seed, names, num_replicas=2, num_orchestrators=2, gap_s=2.0)
    return list(itertools.islice(endless, num))


def jobs(seed: int, num: int, num_orchestrators: int = 2) -> list[Job]:
    cases = make_cases(seed, 12, 100)
    endless = make_jobs(
        seed,
        cases,
        prefix="p",
        max_tokens=300,
        max_gamma=3,
        num_orchestrators=num_orchestrators,
    )
    return list(itertools.islice(endless, num))


def test_schedule_is_a_function_of_the_seed() -> None:
    assert faults(1, 100) == faults(1, 100)
    assert faults(1, 100) != faults(2, 100)


def test_every_fault_occurs_once_per_pass() -> None:
    """All places occur, times increase, and the mean gap is as requested."""
    num = len(FAULTS)
    planned = faults(0, 20 * num)
    for start in range(0, len(planned), num):
        assert {fault.name for fault in planned[start : start + num]} == set(FAULTS)
    assert {(f.tier, f.replica) for f in planned} == {
        *((tier, i) for tier in Tier if tier is not Tier.REDIS for i in range(2)),
        (Tier.REDIS, 0),
    }
    times = [fault.at_s for fault in planned]
    assert times == sorted(times)
    assert times[-1] / len(times) == pytest.approx(2.0, rel=0.1)
    assert {f.link for f in planned} == {0, 1}
    silent = [f.duration_s for f in planned if f.kind is FaultKind.FREEZE]
    assert min(silent) < 3 < max(silent), "below and above the detection time"


def test_fault_names() -> None:
    """A tier, a kind or a single fault; unknown names are rejected."""
    assert set(parse_faults("draft, redis-kill")) == {
        "redis-kill",
        *(name for name in FAULTS if name.startswith("draft-")),
    }
    assert all(name.endswith("-half-close") for name in parse_faults("half-close"))
    assert set(QUICK_FAULTS) < set(FAULTS)
    assert faults(0, 5, ()) == []
    with pytest.raises(ConfigError, match="'meteor' is unknown; allowed: draft-kill"):
        parse_faults("draft,meteor")


def test_jobs_are_a_function_of_the_seed() -> None:
    assert jobs(1, 200) == jobs(1, 200)
    assert jobs(1, 200) != jobs(2, 200)


def test_jobs_cover_all_methods_and_behaviours() -> None:
    """Lengths range from 1 to the maximum; disconnects come before the end."""
    made = jobs(0, 1000)
    assert {job.case.method for job in made} == set(SamplingMethod)
    assert {job.behaviour for job in made} == set(ClientBehaviour)
    assert {job.gamma for job in made} == {None, 0, 1, 3}, "4 exceeds max_gamma"
    lengths = {job.max_tokens for job in made}
    assert min(lengths) == 1
    assert 290 < max(lengths) <= 300
    assert all(
        0 < j.disconnects_at < j.max_tokens - 1 for j in made if j.disconnects_at is not None
    )
    assert len({job.session_id for job in made}) == len(made)
    assert all(job.case.ignores_eos for job in made if not job.case.is_deterministic)


def test_single_orchestrator_gets_no_concurrent_calls() -> None:
    behaviours = {job.behaviour for job in jobs(0, 300, num_orchestrators=1)}
    assert behaviours == {
        ClientBehaviour.LISTENS,
        ClientBehaviour.RETURNS,
        ClientBehaviour.ABANDONS,
    }
