"""What the end-to-end tests share: one Redis, models made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outrider.redis.embedded import RedisServer
from tests import redis_fixture
from tests.e2e.pairs import SpreadPair, TextPair, TinyPair
from tests.patience import patient

redis_server = redis_fixture.redis_server


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """All services share one event loop with many callers. Of these tests alone: others, which the
    same process may run next, are about what is short here."""
    with patient():
        yield


@pytest.fixture(scope="session")
def redis(redis_server: RedisServer) -> str:
    """The URL. Nothing is flushed: sessions are one-off."""
    return redis_server.url


@pytest.fixture(scope="session")
def spread_pair(tmp_path_factory: pytest.TempPathFactory) -> SpreadPair:
    return SpreadPair(tmp_path_factory.mktemp("spread"))


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> TextPair:
    return TextPair(tmp_path_factory.mktemp("text"))
