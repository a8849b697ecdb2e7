"""Errors that clients get when a dependency fails contain no addresses or other internals."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

import orchestrator.app
import outrider.runtime.grpc_server
from orchestrator.sessions import SessionStore
from outrider.redis.embedded import RedisServer
from outrider.settings.services import OrchestratorConfig
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.redis_fixture import redis_command
from tests.services.parts import (
    GREEDY,
    Pair,
    Refusal,
    System,
    Tiers,
    both_tiers,
    orchestrating,
    refusal,
)
from tests.services.replicas import Fault, tier
from tests.stack import request

# An address, a path, a name from Python or Redis, an error number.
INTERNAL = re.compile(
    r"\d+\.\d+\.\d+|localhost|://|/\w+/|:\d{2,5}\b|Err(no|or)|\.py\b|\.sock|@user|<"
)


def assert_is_plain(refused: Refusal, code: grpc.StatusCode, message: str) -> None:
    assert refused.code is code, refused
    assert message in refused.message
    assert not INTERNAL.search(refused.message), refused.message
    for packed in refused.status.details if refused.status else ():
        assert not INTERNAL.search(packed.value.decode("latin1")), packed


async def every_refusal(system: System) -> list[Refusal]:
    one_off = system.generate([1, 2], sampling={**GREEDY, "max_tokens": 4})
    return [await refusal(one_off), *await named_refusals(system)]


async def named_refusals(system: System) -> list[Refusal]:
    """The errors of every method that takes a session id."""
    sampling = {**GREEDY, "max_tokens": 4}
    session: dict[str, Any] = {"session_id": "s"}
    stub = system.client
    return [
        await refusal(system.generate([1, 2], sampling=sampling, create_session=True, **session)),
        await refusal(_read(system, orchestrator_pb2.GenerateRequest(resume_from=0, **session))),
        await refusal(stub.GetSession(orchestrator_pb2.GetSessionRequest(**session))),
        await refusal(stub.DeleteSession(orchestrator_pb2.DeleteSessionRequest(**session))),
    ]


async def _read(system: System, asked: orchestrator_pb2.GenerateRequest) -> None:
    async for _ in system.client.Generate(asked, timeout=200):
        pass


@pytest.mark.slow
async def test_redis_is_unavailable_or_rejects_commands(pair: Pair) -> None:
    """The errors have a retry hint."""
    with RedisServer() as redis:
        async with (
            both_tiers(pair, draft_kv=None) as tiers,
            orchestrating(tiers, redis.url) as system,
        ):
            redis_command(redis.url, "ACL", "SETUSER", "default", "-hset")
            generate, create, *_ = await every_refusal(system)
            for refused in (generate, create):
                assert_is_plain(refused, grpc.StatusCode.UNAVAILABLE, "Redis cannot execute")
            redis_command(redis.url, "ACL", "SETUSER", "default", "+@all")
            redis_command(redis.url, "SET", "outrider:session:{s}", "x")
            named = await named_refusals(system)
            for refused in named:
                message = "session s: its key in Redis has another type"
                assert_is_plain(refused, grpc.StatusCode.FAILED_PRECONDITION, message)
            page = await system.client.ListSessions(
                orchestrator_pb2.ListSessionsRequest(), timeout=60
            )
            assert (len(page.sessions), page.num_unreadable) == (0, 1)
            redis.kill()
            for refused in await every_refusal(system):
                message = "Redis cannot be reached"
                assert_is_plain(refused, grpc.StatusCode.UNAVAILABLE, message)
                assert refused.retry_after_s == 1.0


@pytest.mark.slow
async def test_no_target_replica(pair: Pair, redis_url: str) -> None:
    async with (
        both_tiers(pair, draft_kv=None) as tiers,
        orchestrating(tiers, redis_url, target_wait_s=0.2) as system,
    ):
        await tiers.target.grpc_server.stop(0)
        for _ in range(2):
            refused = await refusal(system.generate([1, 2], sampling={**GREEDY, "max_tokens": 4}))
            assert_is_plain(refused, grpc.StatusCode.UNAVAILABLE, "target replica")


async def test_a_defect(pair: Pair, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of an unexpected exception appears only in the log."""

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("/etc/passwd at 10.0.0.1:6379")

    async with both_tiers(pair, draft_kv=None) as tiers, orchestrating(tiers, redis_url) as system:
        monkeypatch.setattr(SessionStore, "acquire", broken)
        monkeypatch.setattr(SessionStore, "get", broken)
        monkeypatch.setattr(SessionStore, "delete", broken)
        for refused in await every_refusal(system):
            assert_is_plain(refused, grpc.StatusCode.INTERNAL, "an internal error")


@contextlib.asynccontextmanager
async def starting(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The port of an orchestrator that waits for a dependency."""
    ports: asyncio.Queue[int] = asyncio.Queue()
    start = outrider.runtime.grpc_server.Server.start

    async def telling_start(
        server: outrider.runtime.grpc_server.Server, host: str, port: int
    ) -> None:
        await start(server, host, port)
        ports.put_nowait(server.port)

    async def serve() -> None:
        config = OrchestratorConfig(
            target_endpoint="127.0.0.1:1",
            draft_endpoint=None,
            redis_url=redis_url,
            redis_wait_s=600.0,
            port=0,
        )
        async with orchestrator.app.serving(config):
            raise AssertionError("it serves")

    monkeypatch.setattr(outrider.runtime.grpc_server.Server, "start", telling_start)
    serving = asyncio.create_task(serve())
    try:
        yield await ports.get()
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@pytest.mark.parametrize("awaited", ["Redis", "a target replica"])
async def test_the_error_of_a_starting_service_names_what_it_waits_for(
    awaited: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "redis://127.0.0.1:1" if awaited == "Redis" else redis_url
    message = f"the service is starting: waiting for {awaited}"
    async with (
        starting(url, monkeypatch) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        while True:
            asked = request([1])
            refused = await refusal(anext(aiter(stub.Generate(asked, timeout=60))))
            if message in refused.message:
                break
            await asyncio.sleep(0.02)
        assert_is_plain(refused, grpc.StatusCode.UNAVAILABLE, message)


async def test_a_target_whose_pass_raises(redis_url: str, fault: Fault) -> None:
    """The exception's text, about a device or a file, appears only in the log."""
    async with (
        tier() as target,
        orchestrating(Tiers(target.server, None), redis_url) as system,
    ):
        fault.is_on = True
        refused = await refusal(system.generate([1, 2], sampling={**GREEDY, "max_tokens": 4}))
        message = "the target replica failed in this generation"
        assert_is_plain(refused, grpc.StatusCode.INTERNAL, message)
        assert "CUDA" not in refused.message
