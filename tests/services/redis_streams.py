"""Helpers: a stream that is paused while a test disturbs its Redis, and its recorded session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from outrider.redis.embedded import RedisServer
from outrider.v1 import orchestrator_pb2
from tests.redis_fixture import redis_command
from tests.services.parts import (
    GREEDY,
    Brake,
    Pair,
    System,
    Tiers,
    both_tiers,
)
from tests.stack import Output, eventually, request

PROMPT = [3, 1, 4, 1, 5]
NUM_TOKENS = 60
KEY = "outrider:session:{s}"
FIRST: dict[str, Any] = {"session_id": "s", "create_session": True}


@pytest.fixture
async def tiers(pair: Pair) -> AsyncIterator[Tiers]:
    async with both_tiers(pair, draft_kv=None) as tiers:
        yield tiers


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis of the test's own, which it makes unusable."""
    with RedisServer(keeps_data=True) as server:
        yield server


def send(redis: RedisServer, *commands: str) -> None:
    for command in commands:
        assert redis_command(redis.url, *command.split()).startswith((b"+", b":")), command


@contextlib.asynccontextmanager
async def paused_at(
    system: System, brake: Brake, output: Output, num_tokens: int, **fields: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """Pauses a generation after `num_tokens`; the block begins when all of them are sent."""
    brake.set(num_tokens)
    asked = request(PROMPT, {**GREEDY, "max_tokens": NUM_TOKENS}, gamma=0, **fields)

    async def listen() -> None:
        async for chunk in system.client.Generate(asked, timeout=200):
            output.add(chunk)

    listening = asyncio.create_task(listen())
    try:
        await has_sent(listening, output, num_tokens)
        yield listening
    finally:
        brake.release()
        listening.cancel()
        await asyncio.wait([listening])


async def has_sent(listening: asyncio.Task[None], output: Output, num_tokens: int) -> None:
    async def sent() -> bool:
        if listening.done():
            listening.result()
        return len(output.token_ids) >= num_tokens

    await eventually(sent)


def continue_to(brake: Brake, num_tokens: int) -> None:
    """Continues a paused generation up to `num_tokens`."""
    brake.release()
    brake.set(num_tokens)


async def recorded(system: System) -> orchestrator_pb2.GetSessionResponse:
    asked = orchestrator_pb2.GetSessionRequest(session_id="s")
    return await system.client.GetSession(asked, timeout=200)


async def serves(system: System) -> bool:
    """Whether the store reaches Redis again: it pauses after each failure."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        return bool((await recorded(system)).session_id)
    return False
