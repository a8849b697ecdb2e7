"""The circuit breaker of a replica, by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import target_service.service
from orchestrator.breaker import FIRST_OPEN_S, MAX_FAILURES, MAX_OPEN_S, Breaker
from orchestrator.pool import ReplicaPool
from orchestrator.target_link import TargetLink
from outrider.config import TargetConfig
from tests.stack import eventually


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened() -> tuple[Breaker, Clock]:
    clock = Clock()
    breaker = Breaker("target", "somewhere:1", lambda: None, clock)
    for _ in range(MAX_FAILURES):
        assert breaker.allows
        breaker.tried()
        breaker.failed("why")
    return breaker, clock


def test_failures_in_a_row_open_it() -> None:
    breaker, _ = opened()
    assert breaker.is_open
    assert not breaker.allows


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = Breaker("target", "somewhere:1", lambda: None)
    for _ in range(5):
        for _ in range(MAX_FAILURES - 1):
            breaker.failed("why")
        breaker.succeeded()
    assert breaker.allows
    assert not breaker.is_open


def test_one_generation_tries_it_and_closes_it() -> None:
    breaker, clock = opened()
    clock.now += FIRST_OPEN_S
    assert breaker.allows
    breaker.tried()
    assert not breaker.allows, "the others wait for the outcome"
    breaker.succeeded()
    assert breaker.allows
    assert not breaker.is_open


def test_a_trial_without_an_outcome_is_followed_by_another() -> None:
    breaker, clock = opened()
    for _ in range(3):
        clock.now += FIRST_OPEN_S
        assert breaker.allows
        breaker.tried()


def test_failed_trials_come_less_and_less_often() -> None:
    breaker, clock = opened()
    open_s = FIRST_OPEN_S
    for _ in range(10):
        clock.now += open_s
        assert breaker.allows
        breaker.tried()
        breaker.failed("why")
        open_s = min(2 * open_s, MAX_OPEN_S)
        clock.now += 0.99 * open_s
        assert not breaker.allows
        clock.now -= 0.99 * open_s


def test_late_failures_of_those_that_were_there_already_change_nothing() -> None:
    breaker, clock = opened()
    for _ in range(20):
        breaker.failed("why")
    clock.now += FIRST_OPEN_S
    assert breaker.allows


def test_changes_are_told() -> None:
    changes: list[bool] = []
    breaker = Breaker("target", "somewhere:1", lambda: changes.append(breaker.is_open))
    for _ in range(MAX_FAILURES + 3):
        breaker.failed("why")
    breaker.succeeded()
    breaker.succeeded()
    assert changes == [True, False]


async def fits(*_: object) -> None:
    """Any replica may join."""


async def test_room_is_not_sought_at_a_broken_replica() -> None:
    """A request waits for the room of one that works, unless all are broken."""
    settings: dict[str, Any] = {"simulate": "step_ms=1,vocab_size=256", "port": 0}
    settings |= {"kv_cache_tokens": 1_024, "calibration_s": 0.0}
    async with (
        target_service.service.serving(TargetConfig(**settings)) as first,
        target_service.service.serving(TargetConfig(**settings)) as second,
    ):
        endpoints = [f"127.0.0.1:{server.port}" for server in (first, second)]
        pool = ReplicaPool(
            "target",
            lambda endpoint, on_change: TargetLink(endpoint, fits, on_change),
            endpoints,
        )
        async with pool.running():

            async def both_are_there() -> bool:
                return pool.rooms(1_024) == set(endpoints)

            await eventually(both_are_there)
            assert pool.rooms(1_025) == frozenset()
            for link in pool.links.values():
                link.breaker._clock = Clock()
            for broken, left in ((0, {endpoints[1]}), (1, set(endpoints))):
                for _ in range(MAX_FAILURES):
                    pool.links[endpoints[broken]].breaker.failed("a pass failed")
                assert pool.rooms(1_024) == left
