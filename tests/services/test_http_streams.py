"""Streams over HTTP: the server's stop, slow readers, clients that go, counters afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.security.parts import DRAFT, ROOM, SIMULATED
from tests.services.http_client import asked, events
from tests.services.parts import Pair, nothing_held, whole
from tests.stack import Stack, eventually, running_stack
from tests.telemetry.parts import Scrape

BODY: dict[str, Any] = {"prompt": [1, 2, 3], "temperature": 0, "ignore_eos": True, "stream": True}
# Many bytes per token.
UNREAD = {**BODY, "prompt": list(range(10, 50)), "max_tokens": 1_500, "logprobs": 20, "gamma": 0}
NUM_ABORTS = 200


@contextlib.asynccontextmanager
async def simulated(redis_url: str, **settings: Any) -> AsyncIterator[Stack]:
    async with running_stack(
        None, None, redis_url, http_port=0,
        target_settings={**ROOM, "simulate": SIMULATED},
        draft_settings={**ROOM, "simulate": DRAFT}, **settings,
    ) as stack:  # fmt: skip
        yield stack


@contextlib.asynccontextmanager
async def streaming(
    stack: Stack, body: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which the request was sent; its small buffers hold few chunks."""
    host, _, port = stack.http_endpoint.rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4_096)
    content = json.dumps(body).encode()
    head = f"host: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + content)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def scraped(stack: Stack) -> Scrape:
    return Scrape((await asked(stack.http_endpoint, "GET", "/metrics")).content.decode())


@pytest.mark.parametrize("stream", [True, False])
async def test_running_answers_are_finished_before_a_stop(stream: bool, redis_url: str) -> None:
    """Within stop_grace_s, as over gRPC. New connections are refused from the start."""
    async with contextlib.AsyncExitStack() as resources:
        stack = await resources.enter_async_context(simulated(redis_url, stop_grace_s=60.0))
        body = {**BODY, "max_tokens": 300, "stream": stream}
        call = asyncio.create_task(asked(stack.http_endpoint, "POST", "/v1/completions", body))

        async def runs() -> bool:
            return (await stack.target_load()).num_open_generations == 1

        await eventually(runs)
        await resources.aclose()
        answer = await call
        assert answer.status == 200
        if stream:
            *_, last, end, rest = answer.content.decode().split("\n\n")
            assert (
                json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            )
            assert (end, rest) == ("data: [DONE]", "")
        else:
            assert answer.body["choices"][0]["finish_reason"] == "length"
            assert answer.body["usage"]["completion_tokens"] == 300
        with pytest.raises(ConnectionError):
            await asked(stack.http_endpoint, "GET", "/health")


async def test_an_answer_that_a_stop_cuts_off_is_an_error(redis_url: str) -> None:
    """A stream ends with an error event, another answer is 503: clients send it again."""
    async with contextlib.AsyncExitStack() as resources:
        stack = await resources.enter_async_context(simulated(redis_url, stop_grace_s=0.0))
        body = {**BODY, "max_tokens": 10_000}
        streamed = asyncio.create_task(events(stack, "/v1/completions", body))
        whole = asyncio.create_task(
            asked(stack.http_endpoint, "POST", "/v1/completions", {**body, "stream": False})
        )

        async def run() -> bool:
            exposed = await scraped(stack)
            return exposed("outrider_generation_tokens_total") > 20

        await eventually(run)
        await resources.aclose()
        *chunks, error, end = await streamed
        assert {json.loads(chunk)["choices"][0]["finish_reason"] for chunk in chunks} == {None}
        assert json.loads(error)["error"]["code"] == "unavailable"
        assert end == "[DONE]"
        answer = await whole
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


async def test_a_client_that_does_not_read_is_cut_off(pair: Pair, redis_url: str) -> None:
    """Its generation pauses meanwhile; then its slot and KV are freed, and its connection."""
    async with (
        whole(
            pair, redis_url, http_port=0, max_generations=1, max_waiting=1, write_timeout_s=3.0
        ) as stack,
        streaming(stack, UNREAD) as (reader, _),
    ):
        await reader.readuntil(b"data: ")
        answer = await asked(
            stack.http_endpoint, "POST", "/v1/completions",
            {**BODY, "stream": False, "max_tokens": 4},
        )  # fmt: skip
        assert answer.status == 200, "it waited for the slot"
        await eventually(lambda: nothing_held(stack))
        with contextlib.suppress(ConnectionError):
            received = await reader.read(1 << 20)
            while received:
                assert b"[DONE]" not in received
                received = await reader.read(1 << 20)
        exposed = await scraped(stack)
        assert exposed("outrider_unread_streams_total") == 1
        assert exposed("outrider_requests_total", status="CANCELLED") == 1


async def test_a_client_that_does_not_read_stops_generating(pair: Pair, redis_url: str) -> None:
    """It pauses a bounded number of rounds ahead, also with several choices."""
    async with whole(pair, redis_url, http_port=0, write_timeout_s=600.0) as stack:
        async with streaming(stack, {**UNREAD, "n": 3}) as (reader, _):
            await reader.readuntil(b"data: ")
            seen = -1

            async def has_stopped() -> bool:
                nonlocal seen
                before, seen = seen, (await stack.target_load()).num_steps_total
                await asyncio.sleep(0.2)
                return before == seen

            await eventually(has_stopped)
            assert (await stack.target_load()).num_open_generations == 3
        await eventually(lambda: nothing_held(stack))


async def test_counters_agree_after_many_clients_that_go(redis_url: str) -> None:
    """At random points, from before the first token on; streamed or not, one choice or two."""
    rng = random.Random(3)
    async with simulated(redis_url, max_generations=32, max_waiting=256) as stack:
        kinds = [
            {**BODY, "max_tokens": rng.choice((4, 40, 400)), "stream": rng.random() < 0.7,
             "n": rng.choice((1, 2))}
            for _ in range(NUM_ABORTS)
        ]  # fmt: skip

        async def one(body: dict[str, Any], num_bytes: int) -> None:
            async with streaming(stack, body) as (reader, _):
                with contextlib.suppress(asyncio.IncompleteReadError):
                    await reader.readexactly(num_bytes)

        room = asyncio.Semaphore(32)

        async def bounded(body: dict[str, Any]) -> None:
            async with room:
                await one(body, rng.choice((0, 1, 500, 2_000)) if body["stream"] else 0)

        async with asyncio.TaskGroup() as tasks:
            for body in kinds:
                tasks.create_task(bounded(body))
        await eventually(lambda: nothing_held(stack))

        async def all_ended() -> bool:
            exposed = await scraped(stack)
            return exposed("outrider_num_requests_running") == 0

        await eventually(all_ended)
        exposed = await scraped(stack)
        statuses = exposed.counted("outrider_requests_total", "status")
        assert set(statuses) <= {"OK", "CANCELLED"}
        assert 0 < statuses["CANCELLED"] <= sum(statuses.values())
        assert sum(statuses.values()) <= sum(body["n"] for body in kinds)
        assert exposed("outrider_num_requests_waiting") == 0
        load = await stack.target_load()
        assert load.num_opened_total == load.num_closed_total
        answer = await asked(
            stack.http_endpoint, "POST", "/v1/completions",
            {**BODY, "stream": False, "max_tokens": 4},
        )  # fmt: skip
        assert answer.status == 200


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
GET = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"


async def slow(stack: Stack, whole: bytes, begun: bytes) -> bytes:
    """Sends a request, then another's beginning and a byte at a time; returns what it receives."""
    host, _, port = stack.http_endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    received = b""

    async def read() -> None:
        nonlocal received
        with contextlib.suppress(ConnectionError):  # what came before is kept
            while part := await reader.read(65_536):
                received += part

    try:
        writer.write(whole + begun)
        reading = asyncio.create_task(asyncio.wait_for(read(), 60))
        while begun and not (await asyncio.wait([reading], timeout=0.05))[0]:
            writer.write(b"x")
        await reading
        return received
    finally:
        writer.transport.abort()


async def test_slow_requests_are_cut_off(redis_url: str) -> None:
    """Those without headers, or without the rest of them or of a body; not slow answers."""
    async with simulated(redis_url, http_read_timeout_s=2.0, gamma=0) as stack:
        async with streaming(stack, {**BODY, "max_tokens": 20_000}) as (reader, _):
            await reader.readuntil(b"data: ")
            silent, headers, later, body, ignored = await asyncio.gather(
                slow(stack, b"", b""),
                slow(stack, b"", HEAD + b"a: "),
                slow(stack, GET, HEAD + b"a: "),
                slow(stack, b"", HEAD + b"content-length: 100000\r\n\r\n{"),
                slow(stack, b"", HEAD.replace(b"v1", b"v9") + b"content-length: 99999\r\n\r\n{"),
            )
            assert (silent, headers) == (b"", b"")
            assert later.startswith(b"HTTP/1.1 200")
            assert later.count(b"HTTP/1.1") == 1
            assert body.startswith(b"HTTP/1.1 408")
            assert b"within 2 s" in body
            assert ignored.startswith(b"HTTP/1.1 404")
            num_steps = (await stack.target_load()).num_steps_total

            async def still_runs() -> bool:
                await reader.read(65_536)
                return (await stack.target_load()).num_steps_total > num_steps

            await eventually(still_runs)
        await eventually(lambda: nothing_held(stack))
