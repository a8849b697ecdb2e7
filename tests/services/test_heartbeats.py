"""Heartbeats: long passes behind strict proxies, frozen replicas, frozen orchestrators."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

import orchestrator.replicas.replica_stream
import outrider.model_server.stream
from outrider.client import AsyncClient
from outrider.errors import InvalidRequest, Unavailable
from outrider.runtime.grpc_streams import Outbox
from outrider.runtime.heartbeat import Heartbeat
from outrider.runtime.main import LISTENING_PREFIX
from outrider.v1 import target_pb2, target_pb2_grpc
from tests.services.parts import GREEDY, Brake, System, Tiers, orchestrating, refusal
from tests.services.programs import END_TIMEOUT_S, program
from tests.services.proxies import strict_proxy
from tests.services.replicas import PROMPT, SIMULATED, TIMEOUT_S, Frame, Gate, tier
from tests.services.streams import row, target_open
from tests.stack import Output, eventually, request

BEATS = Frame(heartbeat_ms=100)
NUM_TOKENS = 40
MAX_CALLS = 40


@pytest.mark.slow
async def test_a_long_pass_behind_proxies_of_default_settings(redis_url: str, gate: Gate) -> None:
    """9 s without data, in which no ping may be sent: on the client's link and the target's."""
    async with (
        tier() as target,
        strict_proxy(f"127.0.0.1:{target.server.port}") as (to_target, link),
        orchestrating(Tiers(target.server, None), redis_url, target_endpoint=to_target) as system,
        strict_proxy(system.endpoint) as (endpoint, _),
        AsyncClient(endpoint, resume_for_s=0) as client,
    ):
        with capture_logs() as logs:
            gate.shut()
            asked = request(PROMPT, {**GREEDY, "max_tokens": 1})
            calling = asyncio.create_task(client.stream(asked, timeout_s=TIMEOUT_S).result())
            await eventually(gate.holds_a_pass)
            await asyncio.sleep(9.0)
            gate.open()
            output = await calling
    assert len(output.token_ids) == 1
    assert link.methods.count("Verify") == 1
    assert "replica_lost" not in [entry["event"] for entry in logs]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the product's own limit for replicas."""
    monkeypatch.setattr(orchestrator.replicas.replica_stream, "MAX_MISSED_HEARTBEATS", 5)


@pytest.mark.slow
async def test_generations_leave_a_frozen_target(
    redis_url: str, impatient: None, brake: Brake
) -> None:
    """SIGSTOP: the connection stays open without data. The stream continues at another target."""
    async with (
        program("target_service", *SIMULATED) as process,
        tier() as other,
    ):
        assert process.stdout is not None
        async with asyncio.timeout(END_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        address = line.strip().removeprefix(LISTENING_PREFIX)
        both = f"{address},127.0.0.1:{other.server.port}"
        async with (
            grpc.aio.insecure_channel(address) as channel,
            orchestrating(Tiers(other.server, None), redis_url, target_endpoint=both) as system,
        ):
            calls = await _paused_calls(target_pb2_grpc.TargetServiceStub(channel), system, brake)
            process.send_signal(signal.SIGSTOP)
            try:
                brake.release()
                outputs = await asyncio.gather(*calls)
            finally:
                process.send_signal(signal.SIGCONT)
    assert {len(output.token_ids) for output in outputs} == {NUM_TOKENS}
    assert len({tuple(output.token_ids) for output in outputs}) == 1


async def _paused_calls(process: Any, system: System, brake: Brake) -> list[asyncio.Task[Output]]:
    """Streams paused at their tenth token; the last one is at the process."""
    brake.set(10)
    calls: list[asyncio.Task[Output]] = []
    sampling = {**GREEDY, "max_tokens": NUM_TOKENS}

    async def is_at_the_process() -> bool:
        if len(calls) < MAX_CALLS:
            generating = system.generate(PROMPT, sampling=sampling, gamma=0)
            calls.append(asyncio.create_task(generating))
        info = await process.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())
        return bool(info.load.num_open_generations)

    await eventually(is_at_the_process)
    return calls


async def _ended(call: Any, frames: list[Any] | None = None) -> grpc.aio.AioRpcError:
    """Reads all frames and returns the error that ends the stream."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async for frame in call:
                if frames is not None:
                    frames.append(frame)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


async def test_a_waiting_client_gets_heartbeats(redis_url: str, gate: Gate) -> None:
    """Empty responses, starting before the first token. They are not output."""
    async with (
        tier() as target,
        orchestrating(Tiers(target.server, None), redis_url) as system,
    ):
        gate.shut()
        asked = request(PROMPT, {**GREEDY, "max_tokens": 1}, heartbeat_ms=100)
        call = system.client.Generate(asked, timeout=TIMEOUT_S)
        chunks: list[Any] = []
        async for chunk in call:
            chunks.append(chunk)
            if len(chunks) == 3:
                gate.open()
        assert [chunk.ByteSize() for chunk in chunks[:3]] == [0, 0, 0]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 1
        for interval_ms in (99, 60_001):
            refused = await refusal(
                system.generate(PROMPT, heartbeat_ms=interval_ms, sampling=GREEDY)
            )
            assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
            assert refused.fields == ["heartbeat_ms"]


async def test_the_stream_of_a_frozen_orchestrator_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its generations are freed; the status gives the reason."""
    monkeypatch.setattr(outrider.model_server.stream, "MAX_MISSED_HEARTBEATS", 5)
    async with tier() as target:
        call = target.stub().Verify()
        await call.write(BEATS)
        await call.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        frames: list[Any] = []
        ended = await _ended(call, frames)
        assert ended.code() is grpc.StatusCode.UNAVAILABLE
        assert ended.details() == "no frame was received for 0.5 s"
        assert len(frames) > 2, "the service's own heartbeats"

        async def is_free() -> bool:
            return (await target.info()).load.num_open_generations == 0

        await eventually(is_free)


async def test_without_heartbeats_a_stream_may_be_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outrider.model_server.stream, "MAX_MISSED_HEARTBEATS", 1)
    async with tier() as target, target.verify() as silent:
        call = target.stub().Verify()
        await call.write(BEATS)
        assert "no frame was received" in ((await _ended(call)).details() or "")
        await silent.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        assert isinstance(await silent.answer(1), target_pb2.VerifyResult)


@pytest.mark.parametrize("interval_ms", [1, 99, 60_001])
async def test_an_interval_out_of_range_is_refused(interval_ms: int) -> None:
    async with tier() as target:
        call = target.stub().Verify()
        await call.write(Frame(heartbeat_ms=interval_ms))
        ended = await _ended(call)
    assert ended.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (ended.details() or "").startswith("heartbeat_ms: ")


async def test_a_stall_of_this_process_does_not_count() -> None:
    """Nor does time in which no frame is read."""
    heartbeat = Heartbeat(Outbox(), max_missed=3)
    heartbeat.begin(100)
    outlived: list[str] = []

    async def listen() -> None:
        async with heartbeat:
            await asyncio.sleep(0)
            time.sleep(0.5)  # noqa: ASYNC251 (the stall)
            heartbeat.received()
            await asyncio.sleep(0.15)
            outlived.append("a stall")
            with heartbeat.busy():
                await asyncio.sleep(0.5)
            outlived.append("not listening")
            await asyncio.Event().wait()

    with pytest.raises(Unavailable, match=r"no frame was received for 0\.3 s"):
        await listen()
    assert outlived == ["a stall", "not listening"]
    with pytest.raises(InvalidRequest, match="heartbeat_ms"):
        heartbeat.begin(0)


async def test_another_cancellation_is_preserved() -> None:
    """Also if the peer is lost at the same time."""
    heartbeat = Heartbeat(Outbox(), max_missed=1)
    heartbeat.begin(100)

    async def listen() -> None:
        async with heartbeat:
            try:
                await asyncio.Event().wait()
            finally:
                listening.cancel()

    listening = asyncio.create_task(listen())
    with pytest.raises(asyncio.CancelledError):
        await listening
