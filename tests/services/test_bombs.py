"""Messages that are small on the wire and large in memory, over real gRPC; what is left of them.

The walk through them by itself is in tests/runtime/test_message_limits.py.
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
# 900 MiB once parsed, and what this process, which also sends it, may need instead.
LARGE_BYTES = 16 << 20
MOST_MIB = 300
VERIFY = "/outrider.v1.TargetService/Verify"
PROPOSE = "/outrider.v1.DraftService/Propose"
ORCHESTRATOR = "/outrider.v1.OrchestratorService"


@dataclass
class Doors:
    """Channels to all three."""

    target: grpc.aio.Channel
    draft: grpc.aio.Channel
    orchestrator: grpc.aio.Channel

    @property
    def stack(self) -> Stack:
        return Stack(self.orchestrator, self.target, self.draft)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def doors(redis_server: RedisServer) -> AsyncIterator[Doors]:
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
            channels = [
                await s.enter_async_context(grpc.aio.insecure_channel(endpoint))
                for endpoint in endpoints
            ]
            yield Doors(*channels)


async def stream_end(channel: Any, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """How a stream ends after a frame."""
    call = channel.stream_stream(method)()
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(data)
        async with asyncio.timeout(60):
            async for _ in call:
                pass
    return await call.code(), await call.details()


@contextlib.contextmanager
def peak_mib() -> Iterator[list[int]]:
    """How much more memory this process had at its most than at the beginning."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    peak: list[int] = []
    before = _status_kib("VmRSS")
    yield peak
    peak.append(_status_kib("VmHWM") - before >> 10)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


REFUSAL = "frame: more than 131072 fields in one message, the last of them in opens"


async def test_a_frame_for_the_target(doors: Doors) -> None:
    """It ends its stream alone: another's generation goes on. Memory stays."""
    bomb = bombs(target_pb2.VerifyRequest)["opens"](LARGE_BYTES)
    async with raw(target_pb2_grpc.TargetServiceStub(doors.target).Verify()) as stream:
        first = target_pb2.VerifyRequest(opens=[target_open(1)], rows=[row(1, 0, [5])])
        await stream.write(first)
        await stream.answer(1)
        with peak_mib() as peak:
            code, said = await stream_end(doors.target, VERIFY, bomb)
        assert (code, said) == (grpc.StatusCode.INVALID_ARGUMENT, REFUSAL)
        assert peak[0] < MOST_MIB
        await stream.write(target_pb2.VerifyRequest(rows=[row(1, 1, [6])]))
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
    await eventually(lambda: nothing_held(doors.stack))


async def test_a_frame_for_the_draft(doors: Doors) -> None:
    bomb = bombs(draft_pb2.ProposeRequest)["opens.sampling.logit_bias"](LARGE_BYTES)
    async with raw(draft_pb2_grpc.DraftServiceStub(doors.draft).Propose()) as stream:
        code, said = await stream_end(doors.draft, PROPOSE, bomb)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said.startswith("frame: more than 131072 fields in one message, the last of them in")
        opening = draft_open(1, [5], gamma=2)
        await stream.write(draft_pb2.ProposeRequest(opens=[opening]))
        assert isinstance(await stream.answer(1), draft_pb2.Proposal)
    await eventually(lambda: nothing_held(doors.stack))


@pytest.mark.parametrize("name", bombs(orchestrator_pb2.GenerateRequest))
async def test_calls(name: str, doors: Doors) -> None:
    bomb = bombs(orchestrator_pb2.GenerateRequest)[name](2 * SMALL_BYTES + 4_096)
    call: Any = doors.orchestrator.unary_stream(f"{ORCHESTRATOR}/Generate")(bomb, timeout=60)
    refused = await refusal(call.read())
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["frame"]
    assert name.split(".")[0] in refused.message


NAMES = ("Generate", "GetSession", "ListSessions", "DeleteSession", "GetModelInfo")


@pytest.mark.parametrize("name", NAMES)
async def test_what_is_no_message(name: str, doors: Doors) -> None:
    """Not UNKNOWN, with the name of a Python exception."""
    kind: Any = doors.orchestrator.unary_unary
    if name == "Generate":
        kind = doors.orchestrator.unary_stream
    call = kind(f"{ORCHESTRATOR}/{name}")(b"\x0a\x05abc")
    refused = await refusal(call.read() if name == "Generate" else call)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["frame"]
    assert "cannot be read" in refused.message


async def test_health(doors: Doors) -> None:
    """Nobody needs a name to ask it, so it is bounded, too."""
    for channel in (doors.target, doors.draft, doors.orchestrator):
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        refused = await refusal(call(b"\x0a\x00\x1a\x00" * (2 * SMALL_BYTES)))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["frame"]
        assert await call(b"") == b"\x08\x01", "SERVING"


async def test_nothing_is_left_of_what_was_refused(doors: Doors) -> None:
    """The bug: what a stream raised held the frame that it was about, in a circle which only the
    collector opens, and that comes late: each took ten megabytes away. gRPC's `abort` does the
    same for calls."""
    small = bombs(target_pb2.VerifyRequest)["opens"](SMALL_BYTES - 64)
    large = bombs(target_pb2.VerifyRequest)["opens"](4 * SMALL_BYTES)
    text = orchestrator_pb2.GenerateRequest(text="x" * 4_000_001).SerializeToString()
    gc.collect()
    before = _refused()  # other tests' own
    gc.disable()
    try:
        for data in (small, large):
            await stream_end(doors.target, VERIFY, data)
        for data in (text, bombs(orchestrator_pb2.GenerateRequest)["chat.messages"](len(large))):
            call = doors.orchestrator.unary_stream(f"{ORCHESTRATOR}/Generate")(data)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

        async def nothing_is_left() -> bool:
            return _refused() <= before

        await eventually(nothing_is_left)
    finally:
        gc.enable()


def _refused() -> set[int]:
    kinds = (InvalidRequest, target_pb2.VerifyRequest, orchestrator_pb2.GenerateRequest)
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return {id(thing) for thing in found if not _is_heartbeat(thing)}


def _is_heartbeat(thing: Any) -> bool:
    """The frame that a healthy stream sent or read last."""
    return isinstance(thing, target_pb2.VerifyRequest) and not thing.opens
