"""Real Redis for these tests, and long timeouts for everything else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import outrider.telemetry.scraping
from tests import redis_fixture
from tests.patience import patient

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """Also for scrapes: a slow answer must not count as unavailable."""
    with patient(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.telemetry.scraping, "TIMEOUT_S", 60.0)
        yield
