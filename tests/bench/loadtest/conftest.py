"""Simulated system for tests: real services, real gRPC, a real Redis."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import draft_service.app
import target_service.app
from outrider.settings.services import DraftConfig, TargetConfig
from tests import redis_fixture
from tests.services.parts import System, Tiers, orchestrating

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url

_QUICK: dict[str, Any] = {"port": 0, "kv_cache_tokens": 65_536, "calibration_s": 0.0}


@contextlib.asynccontextmanager
async def simulated(
    redis_url: str, *, target: str = "step_ms=4", draft: str = "step_ms=0.5", **settings: Any
) -> AsyncIterator[System]:
    """`settings`: the orchestrator's. Drafts ahead only a chain: all runs in one process."""
    # If the machine stalls for a second, Redis counts as unreachable: generations continue
    # unrecorded.
    settings = {"lookahead": 1, "fan_out": 1, "without_redis": "unrecorded"} | settings
    async with (
        target_service.app.serving(
            TargetConfig(simulate=f"{target},vocab_size=1000", **_QUICK)
        ) as target_server,
        draft_service.app.serving(
            DraftConfig(simulate=f"{draft},vocab_size=1000", **_QUICK)
        ) as draft_server,
        orchestrating(Tiers(target_server, draft_server), redis_url, **settings) as system,
    ):
        yield system
