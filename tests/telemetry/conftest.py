"""The real Redis of these tests, and time enough for what they are not about."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import outrider.telemetry.scraping
from tests import redis_fixture
from tests.e2e.patience import patient

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """Also with a program's metrics: whoever is slow to tell them is not away."""
    with patient(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.telemetry.scraping, "TIMEOUT_S", 60.0)
        yield
