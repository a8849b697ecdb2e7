"""The tiny models of the services' tests, for fuzzing what simulated tiers do not imitate."""

from __future__ import annotations

from tests.services import conftest as services

pair = services.pair
greedy = services.greedy
