"""Three orchestrators and both tiers on an event loop in a thread, so that tests may block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest

import draft_service.app
import orchestrator.app
import target_service.app
from outrider.cli.relay import Relay
from outrider.redis.embedded import RedisServer
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from tests import redis_fixture
from tests.cli import conftest as cli

redis_server, redis_url = redis_fixture.redis_server, redis_fixture.redis_url
target, draft = cli.target, cli.draft

QUICK = {"kv_cache_tokens": 16_384, "calibration_s": 0.0, "port": 0, "stuck_after_s": 60.0}
# Delay of the slow link in each direction: a token without drafts takes at least 0.2 s.
DELAY_S = 0.1


@dataclass(frozen=True)
class Place:
    """Endpoints of two orchestrators and of a slow one; what a further one needs."""

    endpoints: tuple[str, str]
    slow: str
    target: str
    slow_target: str
    model: Path
    redis_url: str


@contextlib.asynccontextmanager
async def served(target: Path, draft: Path, redis_url: str) -> AsyncIterator[Place]:
    async with contextlib.AsyncExitStack() as stack:
        target_config = TargetConfig(model=str(target), **QUICK)
        target_server = await stack.enter_async_context(target_service.app.serving(target_config))
        draft_config = DraftConfig(model=str(draft), **QUICK)
        draft_server = await stack.enter_async_context(draft_service.app.serving(draft_config))
        relay = Relay("127.0.0.1", 0, "127.0.0.1", target_server.port, DELAY_S)
        slow_target = (await stack.enter_async_context(relay)).address
        fast_target = f"127.0.0.1:{target_server.port}"
        endpoints = []
        for target_endpoint in (fast_target, fast_target, slow_target):
            config = OrchestratorConfig(
                target_endpoint=target_endpoint, draft_endpoint=f"127.0.0.1:{draft_server.port}",
                redis_url=redis_url, tokenizer=str(target), port=0, stop_grace_s=0.0,
                draft_wait_ms=20_000.0, lookahead=1, fan_out=1,
            )  # fmt: skip
            server = await stack.enter_async_context(orchestrator.app.serving(config))
            endpoints.append(f"127.0.0.1:{server.port}")
        yield Place(
            (endpoints[0], endpoints[1]), endpoints[2], fast_target, slow_target, target, redis_url
        )


@pytest.fixture(scope="session")
def place(redis_server: RedisServer, target: Path, draft: Path) -> Iterator[Place]:
    ready: Future[Place] = Future()
    stop = threading.Event()

    async def serve() -> None:
        async with served(target, draft, redis_server.url) as place:
            ready.set_result(place)
            await asyncio.to_thread(stop.wait)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    thread = threading.Thread(target=run, name="servers")
    thread.start()
    yield ready.result()
    stop.set()
    thread.join()
