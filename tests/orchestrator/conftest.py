"""Fixtures of the orchestrator's tests: a real Redis, and a session store in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from orchestrator.sessions import SessionStore
from tests import redis_fixture
from tests.orchestrator.sessions.parts import opened
from tests.patience import patient

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    with patient():
        yield


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[SessionStore]:
    async with opened(redis_url) as store:
        yield store
