"""An orchestrator that stops while calls run releases their leases before it ends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest

import orchestrator.app
import orchestrator.generation.recorder
from orchestrator.generation.recorder import Recorder
from orchestrator.sessions import KvHandle
from outrider.errors import Unavailable
from outrider.redis.embedded import RedisServer
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.redis_fixture import redis_command
from tests.services.parts import GREEDY, Brake, Pair, System, both_tiers, orchestrating, refusal
from tests.stack import Output, request

pytestmark = pytest.mark.slow

PROMPT = [3, 1, 4, 1, 5]
LONG_S = 60.0


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a lease could not be released and is retried."""
    failed, release = asyncio.Event(), Recorder._try_release

    async def noted(
        recorder: Recorder, target: KvHandle | None, draft: KvHandle | None, named: bool, done: bool
    ) -> None:
        try:
            await release(recorder, target, draft, named, done)
        except Unavailable:
            failed.set()
            raise

    monkeypatch.setattr(Recorder, "_try_release", noted)
    return failed


async def test_leases_are_released_when_redis_is_back(
    pair: Pair, brake: Brake, failures: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For calls that were cut off, with the tokens they had sent."""
    monkeypatch.setattr(orchestrator.generation.recorder, "_RELEASE_RETRY_S", LONG_S)
    monkeypatch.setattr(orchestrator.app, "CLEANUP_WAIT_S", LONG_S)
    monkeypatch.setattr(orchestrator.app, "STOP_GRACE_S", 0.0)
    output = Output()
    with RedisServer(keeps_data=True) as redis:
        async with both_tiers(pair, draft_kv=None) as tiers, contextlib.AsyncExitStack() as stack:
            async with orchestrating(tiers, redis.url, stop_grace_s=0.0) as system:
                brake.set(20)
                asked = {"session_id": "s", "create_session": True}
                call = await _called(system, stack, **asked)
                while len(output.token_ids) < 20:
                    output.add(await call.read())
                redis.kill()
                call.cancel()
                await failures.wait()  # it is releasing its lease when the stop cancels it again
                failures.clear()
                starting = asyncio.create_task(_start_after(failures, redis))
            await starting
            assert redis_command(redis.url, "HGET outrider:session:{s} lease_epoch") == b"$-1"
            async with orchestrating(tiers, redis.url) as system:
                session = await system.client.GetSession(
                    orchestrator_pb2.GetSessionRequest(session_id="s"), timeout=200
                )
                assert list(session.token_ids) == PROMPT + output.token_ids
                brake.release()
                again = await system.generate(
                    [1], sampling={**GREEDY, "max_tokens": 4}, session_id="s"
                )
                assert len(again.token_ids) == 4


async def _start_after(failures: asyncio.Event, redis: RedisServer) -> None:
    async with asyncio.timeout(LONG_S):
        await failures.wait()
    redis.start()


async def test_a_stop_without_redis_ends(
    pair: Pair, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Redis stays unavailable the leases expire."""
    monkeypatch.setattr(orchestrator.app, "CLEANUP_WAIT_S", 0.2)
    monkeypatch.setattr(orchestrator.app, "STOP_GRACE_S", 0.0)
    with RedisServer() as redis:
        async with both_tiers(pair, draft_kv=None) as tiers, contextlib.AsyncExitStack() as stack:
            async with orchestrating(tiers, redis.url, stop_grace_s=0.0) as system:
                brake.set(5)
                call = await _called(system, stack)
                await call.read()
                redis.kill()
            assert (await refusal(_rest(call))).code is not grpc.StatusCode.OK


async def _called(system: System, stack: contextlib.AsyncExitStack, **fields: Any) -> Any:
    """A call through a channel that outlives the orchestrator."""
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(system.endpoint))
    asked = request(PROMPT, {**GREEDY, "max_tokens": 60}, **fields)
    return orchestrator_pb2_grpc.OrchestratorServiceStub(channel).Generate(asked, timeout=200)


async def _rest(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
