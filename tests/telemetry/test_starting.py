"""Metrics and logs of an orchestrator that waits for Redis or a target; used by alerts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

import orchestrator.app
import orchestrator.startup
from outrider.errors import Unavailable
from outrider.settings.services import OrchestratorConfig
from outrider.telemetry.scraping import Scrape
from tests.stack import eventually


class Starting:
    """An orchestrator that never becomes ready. `logs`: its log events."""

    def __init__(self, logs: list[Any]) -> None:
        self.logs = logs

    def has_logged(self, event: str) -> bool:
        return any(entry["event"] == event for entry in self.logs)

    async def scrape_where(self, holds: Callable[[Scrape], bool]) -> Scrape:
        """The first scrape for which `holds` is true."""
        found: list[Scrape] = []

        async def is_exposed() -> bool:
            for port in [e["port"] for e in self.logs if e["event"] == "metrics"]:
                with contextlib.suppress(Unavailable):
                    found[:] = [await asyncio.to_thread(Scrape.of, f"127.0.0.1:{port}")]
            return bool(found) and holds(found[0])

        await eventually(is_exposed)
        return found[0]


@contextlib.asynccontextmanager
async def starting(**settings: Any) -> AsyncIterator[Starting]:
    config = OrchestratorConfig(
        target_endpoint="127.0.0.1:1", draft_endpoint="127.0.0.1:2", port=0, metrics_port=0,
        **settings,
    )  # fmt: skip

    async def start() -> None:
        async with orchestrator.app.serving(config):
            raise AssertionError("it serves")

    with capture_logs() as logs:
        task = asyncio.create_task(start())
        try:
            yield Starting(logs)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_without_a_target(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No replica is ready, Redis is up. The log repeats what is missing."""
    monkeypatch.setattr(orchestrator.startup, "TARGET_WARNING_S", 0.1)
    async with starting(redis_url=redis_url) as started:

        async def is_logged() -> bool:
            return started.has_logged("waiting_for_target")

        await eventually(is_logged)
        scrape = await started.scrape_where(
            lambda s: s.total("outrider_replicas", tier="target") == 1
        )
    assert scrape.has("outrider_num_requests_running")
    assert scrape.total("outrider_replicas", tier="target", state="ready") == 0
    assert scrape.total("outrider_redis_up") == 1


async def test_without_redis() -> None:
    nowhere = "redis://127.0.0.1:1"
    async with starting(redis_url=nowhere, redis_wait_s=600.0) as started:
        scrape = await started.scrape_where(
            lambda s: s.has("outrider_redis_up") and s.total("outrider_redis_up") == 0
        )
    assert scrape.has("outrider_num_requests_running")
    assert scrape.total("outrider_replicas", state="ready") == 0
