"""Clients that disconnect, read slowly or are cut off: all is freed, others are not affected."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import grpc
import pytest

import orchestrator.app
import orchestrator.generation.recorder
import outrider.model_server.scheduler
from outrider.cli.relay import Relay
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.redis_fixture import redis_command
from tests.services.parts import (
    GREEDY,
    Brake,
    Greedy,
    Pair,
    System,
    both_tiers,
    nothing_held,
    orchestrating,
    refusal,
    whole,
)
from tests.stack import Output, Stack, eventually, request

PROMPT = list(range(10, 50))
LONG = {**GREEDY, "max_tokens": 1_500}
# Deadlines of calls, tried in turn: the first one within which both calls have started.
DEADLINES_S = (0.4, 2.0, 10.0, 60.0)


def asked(prompt: list[int] = PROMPT, **fields: object) -> orchestrator_pb2.GenerateRequest:
    return request(prompt, LONG, gamma=4, **fields)


async def session(stack: Stack, session_id: str) -> orchestrator_pb2.GetSessionResponse:
    return await stack.client.GetSession(
        orchestrator_pb2.GetSessionRequest(session_id=session_id), timeout=200
    )


async def _is_free(stack: Stack, session_id: str) -> bool:
    return not (await session(stack, session_id)).in_use


async def _begun(
    client: orchestrator_pb2_grpc.OrchestratorServiceStub, timeout_s: float
) -> list[grpc.aio.UnaryStreamCall]:
    """Calls of a named session and of a one-off, both after their first tokens."""
    named = {"session_id": "s", "create_session": True}
    calls = [client.Generate(asked(**fields), timeout=timeout_s) for fields in (named, {})]
    for call in calls:
        await anext(aiter(call))
    return calls


async def _until_their_deadline(
    stack: System, client: orchestrator_pb2_grpc.OrchestratorServiceStub, redis_url: str
) -> None:
    for timeout_s in DEADLINES_S:
        try:
            calls = await _begun(client, timeout_s)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # noqa: PT017
            await eventually(lambda: nothing_held(stack))
            redis_command(redis_url, "FLUSHALL")  # as if nothing had been asked
            continue
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return
    raise AssertionError(f"not begun within {DEADLINES_S[-1]} s")


@pytest.mark.parametrize("way", ["cancelled", "deadline", "connection broken"])
async def test_a_disconnected_client_frees_everything(
    way: str, pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    """KV on both tiers, the lease and one-off records; the session can be continued."""
    brake.set(1_000)  # whatever the speed of the machine, none of them has all its tokens before
    async with (
        both_tiers(pair) as tiers,
        orchestrating(tiers, redis_url) as stack,
        Relay("127.0.0.1", 0, "127.0.0.1", int(stack.endpoint.rpartition(":")[2]), 0.0) as relay,
        grpc.aio.insecure_channel(relay.address) as channel,
    ):
        client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        if way == "deadline":
            await _until_their_deadline(stack, client, redis_url)
        else:
            calls = await _begun(client, timeout_s=200.0)
            assert (await stack.target_load()).num_open_generations == 2
            if way == "cancelled":
                for call in calls:
                    call.cancel()
            else:
                relay.reset()
        await eventually(lambda: nothing_held(stack))
        await eventually(lambda: _is_free(stack, "s"))

        async def only_the_named_one_is_left() -> bool:
            return redis_command(redis_url, "DBSIZE") == b":2"  # it and its tokens

        await eventually(only_the_named_one_is_left)
        recorded = list((await session(stack, "s")).token_ids)
        assert recorded[: len(PROMPT)] == PROMPT
        assert recorded == PROMPT + greedy(PROMPT, len(recorded) - len(PROMPT)), "a prefix"
        output = await stack.generate([5, 6], sampling={**GREEDY, "max_tokens": 9}, session_id="s")
        assert output.token_ids == greedy([*recorded, 5, 6], 9)


async def _leave(stack: System, number: int, chance: random.Random) -> None:
    named = {"session_id": f"n-{number}", "create_session": True} if number % 3 == 0 else {}
    prompt = [chance.randrange(250) for _ in range(chance.choice((3, 40, 700)))]
    call = stack.client.Generate(asked(prompt, **named), timeout=200)
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        if number % 2:
            await asyncio.sleep(chance.random() ** 2 * 0.15)
        else:
            async for _ in call:
                if chance.random() < 0.2:
                    break
    call.cancel()


@pytest.mark.slow
async def test_two_hundred_sessions_dropped_at_random_leak_nothing(
    pair: Pair, redis_url: str, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outrider.model_server.scheduler, "TIDY_INTERVAL_S", 0.2)
    async with whole(pair, redis_url) as stack:
        chance = random.Random(1)
        waiting = iter(range(200))

        async def leaver() -> None:
            for number in waiting:
                await _leave(stack, number, chance)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(12):
                tasks.create_task(leaver())
        await eventually(lambda: nothing_held(stack))
        opened = (await stack.target_load()).num_opened_total
        assert opened > 40, "many had begun"

        async def only_named_ones_are_left() -> bool:
            return b"session:{n-" in await _keys(redis_url, "n-*") and not await _keys(
                redis_url, "[0-9a-f]*"
            )

        await eventually(only_named_ones_are_left)
        # The idle tidy asserts the integrity of the KV accounting: a service that fails it is gone.
        await asyncio.sleep(0.6)
        output = await stack.generate(PROMPT, sampling={**GREEDY, "max_tokens": 20}, gamma=4)
        assert output.token_ids == greedy(PROMPT, 20)
        assert output.speculation.num_drafts > 0, "the draft lives too"


async def _keys(redis_url: str, pattern: str) -> bytes:
    reply = await asyncio.to_thread(
        redis_command, redis_url, "KEYS", f"outrider:session:{{{pattern}}}"
    )
    return b"" if reply == b"*0" else reply


@contextlib.asynccontextmanager
async def unread(stack: System, **fields: object) -> AsyncIterator[grpc.aio.UnaryStreamCall]:
    """A call with a small flow-control window whose client stops reading after one chunk."""
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(stack.endpoint, options=options) as channel:
        client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        sampling = {**LONG, "logprobs": 20}
        call = client.Generate(request(PROMPT, sampling, gamma=4, **fields), timeout=200)
        await anext(aiter(call))
        yield call
        call.cancel()


async def test_a_slow_reader_blocks_nobody(pair: Pair, redis_url: str, greedy: Greedy) -> None:
    async with whole(pair, redis_url) as stack, unread(stack) as call:
        outputs = await asyncio.gather(
            *(stack.generate([7, n], sampling={**GREEDY, "max_tokens": 40}) for n in range(4))
        )
        assert not call.done(), "it still waits for its reader"
        for number, output in enumerate(outputs):
            assert output.token_ids == greedy([7, number], 40)


async def test_a_slow_reader_keeps_its_session(
    pair: Pair, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that waits for its client to read keeps its lease: it is renewed."""
    monkeypatch.setattr(orchestrator.generation.recorder, "RENEW_INTERVAL_S", 0.3)

    async def leased_until() -> int:
        words = ("HGET", "outrider:session:{s}", "lease_until")
        reply = await asyncio.to_thread(redis_command, redis_url, *words)
        return int(reply.split()[-1])

    async with (
        whole(pair, redis_url) as stack,
        unread(stack, session_id="s", create_session=True),
    ):
        last = -1
        while (now := len((await session(stack, "s")).token_ids)) != last:
            last = now
            await asyncio.sleep(0.4)
        assert last < len(PROMPT) + 1_500, "the reader limits it"
        until = await leased_until()

        async def is_renewed() -> bool:
            return await leased_until() > until

        for _ in range(3):
            await eventually(is_renewed)
            until = await leased_until()
        assert (await session(stack, "s")).in_use
        refused = await refusal(stack.generate([5], sampling=LONG, session_id="s"))
        assert refused.code is grpc.StatusCode.ABORTED


@pytest.mark.slow
async def test_a_stop_ends_running_streams_as_cancelled(
    pair: Pair, redis_url: str, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams running when the orchestrator stops end with a result and can be continued."""
    monkeypatch.setattr(orchestrator.app, "STOP_GRACE_S", 60)  # a busy machine may need it
    async with both_tiers(pair) as tiers:
        async with contextlib.AsyncExitStack() as serving:
            stack = await serving.enter_async_context(
                orchestrating(tiers, redis_url, stop_grace_s=0.2)  # not for all of its tokens
            )
            channel = grpc.aio.insecure_channel(stack.endpoint)  # not the one that it closes
            client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            output = Output()
            stream = aiter(
                client.Generate(
                    request(PROMPT, {**LONG, "max_tokens": 1_900}, gamma=0, session_id="s",
                            create_session=True),
                    timeout=200,
                )
            )  # fmt: skip
            output.add(await anext(stream))

            async def read() -> None:
                async for chunk in stream:
                    output.add(chunk)

            reading = asyncio.create_task(read())
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(serving.aclose())
            await reading
            await stopping
            await channel.close()
        assert output.result is not None
        assert output.result.finish_reason == orchestrator_pb2.FINISH_REASON_CANCELLED
        assert len(output.token_ids) == output.result.usage.completion_tokens < 1_900
        assert output.token_ids == greedy(PROMPT, len(output.token_ids))
        async with orchestrating(tiers, redis_url) as stack:
            recorded = list((await session(stack, "s")).token_ids)
            assert recorded == PROMPT + output.token_ids
            again = await stack.generate(
                [5, 6], sampling={**GREEDY, "max_tokens": 9}, session_id="s"
            )
            assert again.token_ids == greedy([*recorded, 5, 6], 9)


@pytest.mark.slow
async def test_a_stop_does_not_wait_for_a_slow_reader(
    pair: Pair, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is free for the next orchestrator at once, not only when its lease expires.

    Its call would otherwise last for minutes.
    """
    monkeypatch.setattr(orchestrator.app, "STOP_GRACE_S", 0.2)
    async with both_tiers(pair) as tiers:
        async with contextlib.AsyncExitStack() as reader, contextlib.AsyncExitStack() as serving:
            stack = await serving.enter_async_context(
                orchestrating(tiers, redis_url, stop_grace_s=0.2)
            )
            await reader.enter_async_context(unread(stack, session_id="s", create_session=True))
            await asyncio.sleep(0.5)
            async with asyncio.timeout(60):
                await serving.aclose()
        async with orchestrating(tiers, redis_url) as stack:
            assert not (await session(stack, "s")).in_use
            await eventually(lambda: nothing_held(stack))
