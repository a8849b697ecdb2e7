"""The circuit breaker of a replica, by a clock of the test's own."""

from __future__ import annotations

from orchestrator.breaker import FIRST_OPEN_S, MAX_FAILURES, MAX_OPEN_S, Breaker


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
