"""Turns of a conversation while Redis is away: they are recorded later, or sent again."""

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
    continue_to,
    has_sent,
    paused_at,
    recorded,
    serves,
)
from tests.stack import Output, eventually

pytestmark = pytest.mark.slow

tiers, redis = redis_streams.tiers, redis_streams.redis


@pytest.mark.parametrize("durability", ["DURABLE", "FAST"])
async def test_a_later_turn_continues_without_redis(
    durability: str, tiers: Tiers, redis: RedisServer, greedy: Greedy, brake: Brake
) -> None:
    """Like a first turn. When Redis is back all of it is recorded."""
    mode = orchestrator_pb2.Durability.Value(f"DURABILITY_{durability}")
    output = Output()
    async with orchestrating_at(tiers, redis.url) as system:
        first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
        context = [*PROMPT, *first.token_ids, *PROMPT]
        later: dict[str, Any] = {"session_id": "s", "durability": mode}
        async with paused_before_its_first(system, brake, output, **later) as listening:
            redis.kill()
            continue_to(brake, 40)
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
async def paused_before_its_first(
    system: System, brake: Brake, output: Output, **fields: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """Pauses a later turn that has its lease and no token."""
    before = (await recorded(system)).epoch
    async with paused_at(system, brake, output, 0, **fields) as listening:

        async def has_its_lease() -> bool:
            return (await recorded(system)).epoch > before

        await eventually(has_its_lease)
        yield listening


async def test_a_resumption_of_an_unrecorded_turn_does_not_resume_the_turn_before(
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client has tokens that Redis never had, so it must send the request again.

    Also when it resumes twice, and after other failed calls.
    """
    monkeypatch.setattr(orchestrator.generation.recorder, "_RELEASE_RETRY_S", 0.0)
    output = Output()
    async with orchestrating_at(tiers, redis.url) as second:
        async with orchestrating_at(tiers, redis.url) as system:
            first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
            async with paused_before_its_first(system, brake, output, session_id="s") as listening:
                redis.kill()
                continue_to(brake, 3)
                await has_sent(listening, output, 3)
                listening.cancel()
                brake.release()
            await eventually(lambda: nothing_held(system))
        redis.start()
        await eventually(lambda: serves(second))
        for num_received in (3, 3, 5):
            refused = await refusal(resumed(second, num_received))
            assert refused.code is grpc.StatusCode.NOT_FOUND
            assert "send it again" in refused.message
        again = await second.generate(PROMPT, sampling={**GREEDY, "max_tokens": 9}, session_id="s")
        assert again.token_ids == greedy([*PROMPT, *first.token_ids, *PROMPT], 9)
        assert again.token_ids[:3] == output.token_ids[:3]
        output = await resumed(second, 3)
        assert output.token_ids == again.token_ids[3:]


@pytest.mark.parametrize("turn", ["a first turn", "a later turn"])
@pytest.mark.parametrize("has_left", [True, False])
async def test_a_turn_is_recorded_after_its_client_tried_to_resume_it_elsewhere(
    turn: str,
    has_left: bool,
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
) -> None:
    """Its tokens were sent while Redis was away; the resumption finds no turn.

    Then the turn is written, after that call's lease, and can be resumed.
    """
    output, context = Output(), PROMPT
    async with (
        orchestrating_at(tiers, redis.url) as system,
        orchestrating_at(tiers, redis.url) as second,
    ):
        if turn == "a later turn":
            first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
            context = [*PROMPT, *first.token_ids, *PROMPT]
            begun = paused_before_its_first(system, brake, output, session_id="s")
        else:
            begun = paused_at(system, brake, output, 0, **FIRST)
        async with begun as listening:
            await eventually(lambda: in_use(system))
            redis.kill()
            continue_to(brake, 3)
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
        received = output.token_ids if not has_left else output.token_ids[:3]
        outputs: list[Output] = []

        async def is_resumed() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                outputs.append(await resumed(second, len(received)))
            return bool(outputs)

        await eventually(is_resumed)
        assert received + outputs[0].token_ids == greedy(context, NUM_TOKENS)
        session = await recorded(second)
        assert list(session.token_ids) == context + greedy(context, NUM_TOKENS)


async def in_use(system: System) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        return (await recorded(system)).in_use
    return False


async def resumed(system: System, num_received: int) -> Output:
    output = Output()
    asked = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=num_received)
    async for chunk in system.client.Generate(asked, timeout=200):
        output.add(chunk)
    return output
