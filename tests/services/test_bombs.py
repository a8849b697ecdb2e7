"""Messages that are small on the wire and large in memory, over real gRPC.

The check alone is tested in tests/runtime/test_message_limits.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

import draft_service.app
import orchestrator.app
import target_service.app
from outrider.errors import InvalidRequest
from outrider.redis.embedded import RedisServer
from outrider.runtime.message_limits import SMALL_BYTES
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from outrider.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    orchestrator_pb2,
    target_pb2,
    target_pb2_grpc,
)
from tests.fuzz.bombs import bombs
from tests.services.parts import nothing_held, refusal
from tests.services.streams import draft_open, raw, row, target_open
from tests.stack import Stack, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIMULATION: Any = {
    "simulate": "step_ms=1,vocab_size=256,context_len=4096",
    "port": 0,
    "calibration_s": 0.0,
}
# 900 MiB once parsed. MOST_MIB: allowed peak of this process, which also sends the message.
LARGE_BYTES = 16 << 20
MOST_MIB = 300
VERIFY = "/outrider.v1.TargetService/Verify"
PROPOSE = "/outrider.v1.DraftService/Propose"
ORCHESTRATOR = "/outrider.v1.OrchestratorService"


@dataclass
class Channels:
    """Channels to the three services."""

    target: grpc.aio.Channel
    draft: grpc.aio.Channel
    orchestrator: grpc.aio.Channel
    endpoint: str

    @property
    def stack(self) -> Stack:
        return Stack(self.orchestrator, self.target, self.draft, endpoint=self.endpoint)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def channels(redis_server: RedisServer) -> AsyncIterator[Channels]:
    async with (
        target_service.app.serving(TargetConfig(**SIMULATION)) as target,
        draft_service.app.serving(DraftConfig(**SIMULATION)) as draft,
    ):
        tiers = [f"127.0.0.1:{server.port}" for server in (target, draft)]
        config = OrchestratorConfig(
            redis_url=redis_server.url, port=0, target_endpoint=tiers[0], draft_endpoint=tiers[1]
        )
        async with orchestrator.app.serving(config) as server, contextlib.AsyncExitStack() as s:
            endpoints = [*tiers, f"127.0.0.1:{server.port}"]
            opened = [
                await s.enter_async_context(grpc.aio.insecure_channel(endpoint))
                for endpoint in endpoints
            ]
            yield Channels(*opened, endpoint=endpoints[-1])


async def stream_end(channel: Any, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Final status of a stream after this frame."""
    call = channel.stream_stream(method)()
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(data)
        async with asyncio.timeout(60):
            async for _ in call:
                pass
    return await call.code(), await call.details()


@contextlib.contextmanager
def peak_mib() -> Iterator[list[int]]:
    """Peak memory of this process in the block, minus the memory at its start."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
    peak: list[int] = []
    before = _status_kib("VmRSS")
    yield peak
    peak.append(_status_kib("VmHWM") - before >> 10)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


REFUSAL = "frame: more than 131072 fields in one message, the last of them in opens"


async def test_a_hostile_frame_at_the_target(channels: Channels) -> None:
    """Only its own stream ends: another stream's generation continues. Memory stays bounded."""
    bomb = bombs(target_pb2.VerifyRequest)["opens"](LARGE_BYTES)
    async with raw(target_pb2_grpc.TargetServiceStub(channels.target).Verify()) as stream:
        first = target_pb2.VerifyRequest(opens=[target_open(1)], rows=[row(1, 0, [5])])
        await stream.write(first)
        await stream.answer(1)
        with peak_mib() as peak:
            code, details = await stream_end(channels.target, VERIFY, bomb)
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, REFUSAL)
        assert peak[0] < MOST_MIB
        await stream.write(target_pb2.VerifyRequest(rows=[row(1, 1, [6])]))
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
    await eventually(lambda: nothing_held(channels.stack))


async def test_a_hostile_frame_at_the_draft(channels: Channels) -> None:
    bomb = bombs(draft_pb2.ProposeRequest)["opens.sampling.logit_bias"](LARGE_BYTES)
    async with raw(draft_pb2_grpc.DraftServiceStub(channels.draft).Propose()) as stream:
        code, details = await stream_end(channels.draft, PROPOSE, bomb)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(
            "frame: more than 131072 fields in one message, the last of them in"
        )
        opening = draft_open(1, [5], gamma=2)
        await stream.write(draft_pb2.ProposeRequest(opens=[opening]))
        assert isinstance(await stream.answer(1), draft_pb2.Proposal)
    await eventually(lambda: nothing_held(channels.stack))


@pytest.mark.parametrize("name", bombs(orchestrator_pb2.GenerateRequest))
async def test_hostile_requests(name: str, channels: Channels) -> None:
    bomb = bombs(orchestrator_pb2.GenerateRequest)[name](2 * SMALL_BYTES + 4_096)
    call: Any = channels.orchestrator.unary_stream(f"{ORCHESTRATOR}/Generate")(bomb, timeout=60)
    refused = await refusal(call.read())
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["frame"]
    assert name.split(".")[0] in refused.message


NAMES = ("Generate", "GetSession", "ListSessions", "DeleteSession", "GetModelInfo")


@pytest.mark.parametrize("name", NAMES)
async def test_malformed_requests(name: str, channels: Channels) -> None:
    """INVALID_ARGUMENT, not UNKNOWN with the name of a Python exception."""
    kind: Any = channels.orchestrator.unary_unary
    if name == "Generate":
        kind = channels.orchestrator.unary_stream
    call = kind(f"{ORCHESTRATOR}/{name}")(b"\x0a\x05abc")
    refused = await refusal(call.read() if name == "Generate" else call)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["frame"]
    assert "cannot be read" in refused.message


async def test_hostile_health_checks(channels: Channels) -> None:
    """Health needs no credentials, so its messages are checked, too."""
    for channel in (channels.target, channels.draft, channels.orchestrator):
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        refused = await refusal(call(b"\x0a\x00\x1a\x00" * (2 * SMALL_BYTES)))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["frame"]
        assert await call(b"") == b"\x08\x01", "SERVING"


async def test_rejected_messages_are_freed(channels: Channels) -> None:
    """Regression: an error and its frame were in a reference cycle, so each stream kept 10 MB until
    the garbage collector ran. gRPC's `abort` does the same for calls."""
    small = bombs(target_pb2.VerifyRequest)["opens"](SMALL_BYTES - 64)
    large = bombs(target_pb2.VerifyRequest)["opens"](4 * SMALL_BYTES)
    text = orchestrator_pb2.GenerateRequest(text="x" * 4_000_001).SerializeToString()
    gc.collect()
    before = _refused()  # of other tests
    gc.disable()
    try:
        for data in (small, large):
            await stream_end(channels.target, VERIFY, data)
        for data in (text, bombs(orchestrator_pb2.GenerateRequest)["chat.messages"](len(large))):
            call = channels.orchestrator.unary_stream(f"{ORCHESTRATOR}/Generate")(data)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

        async def is_freed() -> bool:
            return _refused() <= before

        await eventually(is_freed)
    finally:
        gc.enable()


def _refused() -> set[int]:
    kinds = (InvalidRequest, target_pb2.VerifyRequest, orchestrator_pb2.GenerateRequest)
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return {id(thing) for thing in found if not _is_heartbeat(thing)}


def _is_heartbeat(thing: Any) -> bool:
    """Whether it is the last frame of a healthy stream."""
    return isinstance(thing, target_pb2.VerifyRequest) and not thing.opens
