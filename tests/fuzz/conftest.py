"""The tiny models of the services' tests, for fuzzing what simulated tiers do not imitate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.patience import patient
from tests.services import conftest as services

pair = services.pair
greedy = services.greedy


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """Of services in this process: who is busy is not away."""
    with patient():
        yield
