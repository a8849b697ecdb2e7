"""Turns of a conversation while Redis is away: what was shown is recorded, or asked for again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

import orchestrator.generation.recorder
from outrider.redis.embedded import RedisServer
from outrider.v1 import orchestrator_pb2
from tests.services import redis_streams
from tests.services.parts import (
    GREEDY,
    Brake,
    Greedy,
    System,
    Tiers,
    nothing_held,
    refusal,
)
from tests.services.parts import orchestrating as orchestrating_at
from tests.services.redis_streams import (
    FIRST,
    NUM_TOKENS,
    PROMPT,
    goes_on,
    has_sent,
    held_at,
    recorded,
    serves,
)
from tests.stack import Output, eventually

pytestmark = pytest.mark.slow

tiers, redis = redis_streams.tiers, redis_streams.redis


@pytest.mark.parametrize("durability", ["DURABLE", "FAST"])
async def test_a_later_turn_goes_on_without_redis(
    durability: str, tiers: Tiers, redis: RedisServer, greedy: Greedy, brake: Brake
) -> None:
    """As a first one does; when Redis is back all of it is recorded."""
    mode = orchestrator_pb2.Durability.Value(f"DURABILITY_{durability}")
    output = Output()
    async with orchestrating_at(tiers, redis.url) as system:
        first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
        context = [*PROMPT, *first.token_ids, *PROMPT]
        later: dict[str, Any] = {"session_id": "s", "durability": mode}
        async with held_before_its_first(system, brake, output, **later) as listening:
            redis.kill()
            goes_on(brake, 40)
            await has_sent(listening, output, 40)
            redis.start()
            await eventually(lambda: serves(system))
            brake.release()
            await listening
        session = await recorded(system)
    assert output.token_ids == greedy(context, NUM_TOKENS)
    assert output.result is not None
    assert output.result.recorded
    assert list(session.token_ids) == context + output.token_ids
    assert session.num_turns == 2


@contextlib.asynccontextmanager
async def held_before_its_first(
    system: System, brake: Brake, output: Output, **fields: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """A later turn that has its lease, and no token."""
    before = (await recorded(system)).epoch
    async with held_at(system, brake, output, 0, **fields) as listening:

        async def has_its_lease() -> bool:
            return (await recorded(system)).epoch > before

        await eventually(has_its_lease)
        yield listening


async def test_a_later_turn_of_which_nothing_was_recorded_is_not_the_one_before(
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its caller holds tokens that Redis never had: the call is to be sent again, as a first one.

    Also when it asks twice, and when other calls have failed meanwhile.
    """
    monkeypatch.setattr(orchestrator.generation.recorder, "_RELEASE_RETRY_S", 0.0)
    output = Output()
    async with orchestrating_at(tiers, redis.url) as second:
        async with orchestrating_at(tiers, redis.url) as system:
            first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
            async with held_before_its_first(system, brake, output, session_id="s") as listening:
                redis.kill()
                goes_on(brake, 3)
                await has_sent(listening, output, 3)
                listening.cancel()
                brake.release()
            await eventually(lambda: nothing_held(system))
        redis.start()
        await eventually(lambda: serves(second))
        for num_held in (3, 3, 5):
            refused = await refusal(resumed(second, num_held))
            assert refused.code is grpc.StatusCode.NOT_FOUND
            assert "send it again" in refused.message
        again = await second.generate(PROMPT, sampling={**GREEDY, "max_tokens": 9}, session_id="s")
        assert again.token_ids == greedy([*PROMPT, *first.token_ids, *PROMPT], 9)
        assert again.token_ids[:3] == output.token_ids[:3]
        told = await resumed(second, 3)
        assert told.token_ids == again.token_ids[3:]


@pytest.mark.parametrize("turn", ["a first turn", "a later turn"])
@pytest.mark.parametrize("has_left", [True, False])
async def test_a_turn_is_recorded_though_its_caller_has_asked_for_it_elsewhere(
    turn: str,
    has_left: bool,
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
) -> None:
    """Shown while Redis was away, and asked for before it was written: nothing is known of it yet.

    Then it is written, behind the lease of the call that found nothing, and can be resumed.
    """
    output, context = Output(), PROMPT
    async with (
        orchestrating_at(tiers, redis.url) as system,
        orchestrating_at(tiers, redis.url) as second,
    ):
        if turn == "a later turn":
            first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
            context = [*PROMPT, *first.token_ids, *PROMPT]
            begun = held_before_its_first(system, brake, output, session_id="s")
        else:
            begun = held_at(system, brake, output, 0, **FIRST)
        async with begun as listening:
            await eventually(lambda: in_use(system))
            redis.kill()
            goes_on(brake, 3)
            await has_sent(listening, output, 3)
            redis.start()
            await eventually(lambda: serves(second))
            for _ in range(2):
                refused = await refusal(resumed(second, 3))
                assert refused.code is grpc.StatusCode.NOT_FOUND
            if has_left:
                listening.cancel()
                await asyncio.wait([listening])
                await eventually(lambda: nothing_held(system))
                brake.release()
            else:
                brake.release()
                await listening
        held = output.token_ids if not has_left else output.token_ids[:3]
        told: list[Output] = []

        async def is_resumed() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                told.append(await resumed(second, len(held)))
            return bool(told)

        await eventually(is_resumed)
        assert held + told[0].token_ids == greedy(context, NUM_TOKENS)
        session = await recorded(second)
        assert list(session.token_ids) == context + greedy(context, NUM_TOKENS)


async def in_use(system: System) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        return (await recorded(system)).in_use
    return False


async def resumed(system: System, num_held: int) -> Output:
    output = Output()
    asked = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=num_held)
    async for chunk in system.client.Generate(asked, timeout=200):
        output.add(chunk)
    return output
