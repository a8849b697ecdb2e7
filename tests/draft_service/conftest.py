"""One model pair for all tests of the draft's parts, on one thread; a draft worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from draft_service import scheduler_worker
from draft_service.tree import draft_session
from outrider.engine import Engine, EngineOptions, load_engine
from outrider.model_server import step_costs
from tests.draft_service.draft_worker import KV_TOKENS, Draft
from tests.services.conftest import draft_greedy, greedy, pair
from tests.services.noting import Clock
from tests.services.parts import Greedy, Pair

__all__ = ["draft_greedy", "greedy", "pair"]


@pytest.fixture
def engine(pair: Pair) -> Engine:
    return load_engine(EngineOptions(str(pair.draft), kv_cache_tokens=KV_TOKENS))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (step_costs, scheduler_worker, draft_session):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def draft(engine: Engine, clock: Clock) -> Iterator[Draft]:
    """Passes take no time, so rows are unlimited."""
    made = Draft(engine, clock)
    yield made
    made.close()


@pytest.fixture(scope="module")
def truth(pair: Pair) -> Greedy:
    """The draft's greedy tokens."""
    return Greedy(pair.draft)
