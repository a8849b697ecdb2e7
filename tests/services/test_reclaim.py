"""Preemption in favour of a more urgent generation: enough KV is freed, and no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from outrider.engine.simulated import SimulatedEngine
from outrider.model_server.messages import Failure, FailureReason
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams
from outrider.settings.simulation import Simulation
from target_service.messages import OpenTarget, Verified, Verify
from target_service.verifier import Verifier

PAGE = 16
SIMULATION = Simulation.parse("step_ms=0,vocab_size=50,context_len=1024")
COMMON = [7] * (4 * PAGE)


class Target:
    """A target with ten pages. Generations are opened in turn; the first is the most urgent."""

    def __init__(self) -> None:
        self.engine = SimulatedEngine(SIMULATION, 10 * PAGE)
        self.verifier = Verifier(
            self.engine, max_gamma=4, max_step_tokens=512, idle_session_ttl_s=60.0
        )

    def open(self, number: int, context: Sequence[int], priority: int = 2) -> set[int]:
        """The generations closed for it, or itself if it has no room."""
        key = GenerationKey(1, number)
        params = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
        max_len = -(-(len(context) + 1) // PAGE) * PAGE
        opening = OpenTarget(
            key, f"s{number}", 1, 0, len(context), max_len, params, priority, preempts=True
        )
        row = Verify(key, 0, np.asarray(context), np.zeros(0, np.int64), None)
        results = self.verifier.step([opening, row], lambda: False)
        while self.verifier.has_work:
            results += self.verifier.step([], lambda: False)
        self.engine.store.check_integrity()
        closed = [result for result in results if isinstance(result, Failure)]
        assert all(failure.reason is FailureReason.KV_FULL for failure in closed)
        assert len([r for r in results if isinstance(r, Verified)]) == all(
            failure.key != key for failure in closed
        )
        return {failure.key.generation_id for failure in closed}


@pytest.fixture
def target() -> Target:
    """1 has two pages; 2 and 3 share four and have one of their own each; two are free."""
    made = Target()
    assert made.open(1, [1] * 20, priority=0) == set()
    assert made.open(2, [*COMMON, 2]) == set()
    assert made.open(3, [*COMMON, 3]) == set()
    assert made.engine.store.used_tokens == 8 * PAGE
    return made


def test_none_is_closed_in_vain(target: Target) -> None:
    """Without both, eight pages are free: it needs eight, and one is reserved for the first."""
    assert target.open(4, [4] * (7 * PAGE + 1), priority=1) == {4}
    assert target.verifier.num_open == 3


def test_shared_pages_are_free_when_all_their_owners_are_closed(target: Target) -> None:
    assert target.open(4, [4] * (6 * PAGE + 1), priority=1) == {2, 3}
    assert target.verifier.num_open == 2


def test_the_last_one_is_enough(target: Target) -> None:
    assert target.open(4, [4] * (PAGE + 1), priority=1) == {3}
    assert target.verifier.num_open == 3


def test_pages_that_it_shares_itself_are_not_counted_as_room(target: Target) -> None:
    """Without the others, four are free besides the shared ones; one is reserved for the first."""
    assert target.open(4, [*COMMON, *[4] * (3 * PAGE + 1)], priority=1) == {4}
    assert target.verifier.num_open == 3
    assert target.open(5, [*COMMON, *[4] * (2 * PAGE + 1)], priority=1) == {2, 3}


def test_one_that_is_not_needed_stays() -> None:
    """The least urgent one has a single page, which would not be enough."""
    target = Target()
    assert target.open(1, [1] * (3 * PAGE + 1), priority=2) == set()
    assert target.open(2, [2] * 10, priority=3) == set()
    assert target.open(3, [3] * (6 * PAGE + 1), priority=1) == {1}
    assert target.verifier.num_open == 2
