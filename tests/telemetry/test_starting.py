"""What an orchestrator tells while it still waits for what it needs: alerts are made of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

import orchestrator.service
from outrider.config import OrchestratorConfig
from outrider.errors import Unavailable
from outrider.telemetry.scraping import Scrape
from tests.stack import eventually


@contextlib.asynccontextmanager
async def starting(**settings: Any) -> AsyncIterator[str]:
    """Where its metrics are; it never comes so far as to serve."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = OrchestratorConfig(
        target_endpoint="127.0.0.1:1", draft_endpoint="127.0.0.1:2", port=0, metrics_port=port,
        **settings,
    )  # fmt: skip

    async def start() -> None:
        async with orchestrator.service.serving(config):
            raise AssertionError("it serves")

    task = asyncio.create_task(start())
    try:
        yield f"127.0.0.1:{port}"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def told(address: str) -> Scrape | None:
    try:
        return await asyncio.to_thread(Scrape.of, address)
    except Unavailable:
        return None


async def test_without_a_target(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No replica is ready, Redis is there; and the log says what is missing, again and again."""
    monkeypatch.setattr(orchestrator.service, "TARGET_TOLD_S", 0.1)
    with capture_logs() as logs:
        async with starting(redis_url=redis_url) as address:

            async def is_told() -> bool:
                scrape = await told(address)
                return scrape is not None and scrape.total("outrider_replicas", tier="target") == 1

            async def is_logged() -> bool:
                return any(entry["event"] == "waiting_for_target" for entry in logs)

            await eventually(is_told)
            await eventually(is_logged)
            scrape = await told(address)
    assert scrape is not None
    assert scrape.has("outrider_num_requests_running")
    assert scrape.total("outrider_replicas", tier="target", state="ready") == 0
    assert scrape.total("outrider_redis_up") == 1


async def test_without_redis() -> None:
    nowhere = "redis://127.0.0.1:1"
    async with starting(redis_url=nowhere, redis_wait_s=60.0) as address:

        async def is_away() -> bool:
            scrape = await told(address)
            has_told = scrape is not None and scrape.has("outrider_redis_up")
            return has_told and scrape.total("outrider_redis_up") == 0

        await eventually(is_away)
        scrape = await told(address)
    assert scrape is not None
    assert scrape.has("outrider_num_requests_running")
    assert scrape.total("outrider_replicas", state="ready") == 0
