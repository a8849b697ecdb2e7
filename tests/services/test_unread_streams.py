"""Clients that never read: their streams end, resources are freed, sessions can be resumed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from outrider.cli.relay import Relay
from outrider.security.keys import KeyLimits
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.security.parts import write_keys
from tests.services.parts import GREEDY, Greedy, Pair, System, nothing_held, whole
from tests.stack import Output, eventually, request
from tests.telemetry.parts import Scrape, get

PROMPT = list(range(10, 50))
NUM_STREAMS = 4
NUM_TOKENS = 1_500
# Many bytes per token and small windows: few tokens fill the client's buffers.
UNREAD = {**GREEDY, "max_tokens": NUM_TOKENS, "logprobs": 20}
WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
SHORT = {**GREEDY, "max_tokens": 4}


@contextlib.asynccontextmanager
async def unread(
    endpoint: str, num: int, metadata: tuple[tuple[str, str], ...] = ()
) -> AsyncIterator[list[Any]]:
    """Streams of sessions s-0, s-1 … whose client reads only one chunk of each."""
    async with grpc.aio.insecure_channel(endpoint, options=WINDOW) as channel:
        client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        calls = [
            client.Generate(
                request(PROMPT, UNREAD, gamma=0, session_id=f"s-{n}", create_session=True),
                timeout=200,
                metadata=metadata,
            )
            for n in range(num)
        ]
        for call in calls:
            await call.read()
        yield calls
        for call in calls:
            call.cancel()


async def rest_of(call: Any) -> Output:
    output = Output()
    with contextlib.suppress(grpc.aio.AioRpcError):
        while (chunk := await call.read()) is not grpc.aio.EOF:
            output.add(chunk)
    return output


async def _num_recorded(stack: System, session_id: str) -> int:
    asked = orchestrator_pb2.GetSessionRequest(session_id=session_id)
    return len((await stack.client.GetSession(asked)).token_ids) - len(PROMPT)


@pytest.mark.slow
async def test_unread_streams_end_and_free_their_slots_and_kv(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """Each client gets the reason once it reads, and can resume where it stopped reading."""
    async with (
        whole(
            pair, redis_url, max_generations=NUM_STREAMS, max_waiting=1, write_timeout_s=3.0,
            metrics_port=0,
        ) as stack,
        unread(stack.endpoint, NUM_STREAMS) as calls,
    ):  # fmt: skip
        output = await stack.generate(PROMPT, sampling=SHORT)  # waits for a slot
        assert output.token_ids == greedy(PROMPT, 4)
        await eventually(lambda: nothing_held(stack))
        assert not any(call.done() for call in calls), "nobody has read the status yet"
        (first, *_) = calls
        received = await rest_of(first)
        assert await first.code() is grpc.StatusCode.CANCELLED
        assert "write_timeout_s" in await first.details()
        num_received = len(received.token_ids) + 1
        assert num_received < NUM_TOKENS
        asked = orchestrator_pb2.GenerateRequest(session_id="s-0", resume_from=num_received)
        rest = Output()
        async for chunk in stack.client.Generate(asked, timeout=200):
            rest.add(chunk)
        assert received.token_ids + rest.token_ids == greedy(PROMPT, NUM_TOKENS)[1:]
        exposed = Scrape(await get(stack.metrics_port))
        assert exposed("outrider_unread_streams_total") == NUM_STREAMS
        assert exposed("outrider_requests_total", status="CANCELLED") == NUM_STREAMS


async def test_a_stream_that_is_not_read_stops_generating(pair: Pair, redis_url: str) -> None:
    """It pauses a bounded number of rounds ahead of what is sent, long before its timeout."""
    async with (
        whole(pair, redis_url, write_timeout_s=600.0, metrics_port=0) as stack,
        unread(stack.endpoint, 1) as (call,),
    ):
        seen = -1

        async def has_stopped() -> bool:
            nonlocal seen
            before, seen = seen, (await stack.target_load()).num_steps_total
            await asyncio.sleep(0.2)
            return before == seen

        await eventually(has_stopped)
        assert await _num_recorded(stack, "s-0") < NUM_TOKENS
        assert not call.done()
        call.cancel()
        await eventually(lambda: nothing_held(stack))
        assert await _ended(stack) == {"CANCELLED": 1}, "not a fault of the service's"


async def _ended(stack: System) -> dict[str, float]:
    """Counts of calls by status, after one has ended."""
    found: dict[str, float] = {}

    async def has_ended() -> bool:
        exposed = Scrape(await get(stack.metrics_port))
        found.update(exposed.counted("outrider_requests_total", "status"))
        return bool(found)

    await eventually(has_ended)
    return found


@pytest.mark.slow
async def test_a_clients_deadline_is_counted_as_deadline_exceeded(
    pair: Pair, redis_url: str
) -> None:
    """Also if it passes during a write. The client's reset never arrives."""
    async with whole(pair, redis_url, write_timeout_s=600.0, metrics_port=0) as stack:
        host, _, port = stack.endpoint.rpartition(":")
        async with (
            Relay("127.0.0.1", 0, host, int(port), 0.0) as relay,
            grpc.aio.insecure_channel(relay.address, options=WINDOW) as channel,
        ):
            client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            call = client.Generate(request(PROMPT, UNREAD, gamma=0), timeout=8)
            await call.read()
            relay.hold()
            assert await _ended(stack) == {"DEADLINE_EXCEEDED": 1}


@pytest.mark.slow
async def test_an_unread_stream_frees_its_keys_stream_limit(
    pair: Pair, redis_url: str, tmp_path: Path
) -> None:
    """Although its status cannot be sent before the client reads."""
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(streams=1))
    metadata = (("x-api-key", keys["ada"]),)
    settings = {"api_keys_file": str(tmp_path / "keys"), "write_timeout_s": 3.0}
    async with (
        whole(pair, redis_url, **settings) as stack,
        unread(stack.endpoint, 1, metadata),
    ):
        asked = request(PROMPT, SHORT)

        async def is_let_in() -> bool:
            call = stack.client.Generate(asked, timeout=200, metadata=metadata)
            await rest_of(call)
            code = await call.code()
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
            return code is grpc.StatusCode.OK

        assert not await is_let_in()
        await eventually(is_let_in)
