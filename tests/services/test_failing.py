"""A replica whose passes fail: out of service after three, then back after a self-test, or ended.

The tiers are simulated: what is tested is the service around an engine, which is the same.
"""

from __future__ import annotations

from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

import target_service.app
from outrider.errors import InternalError
from outrider.model_server import failure_policy as recovery
from outrider.redis.registry import ReplicaState
from outrider.runtime.grpc_server import LIVENESS
from outrider.settings.services import DraftConfig, ModelServiceConfig
from outrider.v1 import draft_pb2, draft_pb2_grpc, target_pb2
from tests.services.replicas import (
    FAILING,
    NOT_SERVING,
    PROMPT,
    READY,
    SERVING,
    TIMEOUT_S,
    Fault,
    Frame,
    has_states,
    registered,
    tier,
)
from tests.services.streams import Stream, draft_commit, draft_open, raw, row, target_open
from tests.stack import eventually
from tests.telemetry.parts import scrape

Reason = target_pb2.RowError


async def failed(stream: Stream, *numbers: int) -> None:
    """Sends each request in a pass of its own, which fails."""
    for number in numbers:
        await stream.write(Frame(opens=[target_open(number)], rows=[row(number, 0, PROMPT)]))
        answer = await stream.answer(number)
        assert answer.reason == Reason.REASON_INTERNAL
        assert "CUDA error" in answer.detail


async def succeeded(stream: Stream, number: int) -> None:
    await stream.write(Frame(opens=[target_open(number)], rows=[row(number, 0, PROMPT)]))
    assert isinstance(await stream.answer(number), target_pb2.VerifyResult)


async def test_out_of_service_and_back(
    redis_url: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not ready but alive; the log has the error. The first successful self-test ends it."""
    monkeypatch.setattr(recovery, "MAX_FAILED_SELF_TESTS", 10_000)
    async with (
        registered(redis_url) as registry,
        tier(redis_url=redis_url, metrics_port=0) as target,
        target.verify() as stream,
    ):
        await has_states(stream, READY)
        with capture_logs() as logs:
            fault.is_on = True
            await failed(stream, 1, 2, 3)
            await has_states(stream, READY, FAILING)
            await registry.becomes(ReplicaState.FAILING)
            assert not await target.is_healthy()
            assert await target.health(target_service.app.SERVICE_NAME) == NOT_SERVING
            assert await target.health(LIVENESS) == SERVING
            assert (await target.info()).state == FAILING
            states = (await scrape(target.server)).by("outrider_replica_state", "state")
            assert (states["failing"], states["ready"]) == (1, 0)
            await stream.write(Frame(opens=[target_open(4)]))
            assert (await stream.answer(4)).reason == Reason.REASON_DRAINING

            fault.is_on = False
            await has_states(stream, READY, FAILING, READY)
        (entry,) = [entry for entry in logs if entry["event"] == "replica_failing"]
        assert "CUDA error" in entry["why"]
        assert [entry for entry in logs if entry["event"] == "replica_works_again"]
        await registry.becomes(ReplicaState.READY)
        await eventually(target.is_healthy, TIMEOUT_S)
        assert (await target.info()).load.kv_used_tokens == 0, "a self-test leaves nothing"
        await succeeded(stream, 5)


async def test_a_successful_pass_resets_the_count(fault: Fault) -> None:
    """Only consecutive failures count."""
    async with tier() as target, target.verify() as stream:
        await has_states(stream, READY)
        for number in range(0, 40, 4):
            fault.is_on = True
            await failed(stream, number + 1, number + 2)
            fault.is_on = False
            await succeeded(stream, number + 3)
        assert stream.states == [READY]


async def test_a_self_test_that_never_succeeds_ends_it(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liveness is false, and the program ends with an error that has the reason."""
    monkeypatch.setattr(recovery, "SELF_TEST_INTERVAL_S", 0.05)
    async with tier(stop_grace_s=TIMEOUT_S) as target, target.verify() as stream:
        stub = health_pb2_grpc.HealthStub(target.channel)
        alive = stub.Watch(health_pb2.HealthCheckRequest(service=LIVENESS))
        assert (await alive.read()).status == SERVING
        fault.is_on = True
        await failed(stream, 1, 2, 3)
        assert (await alive.read()).status == NOT_SERVING
        alive.cancel()
        with pytest.raises(BaseExceptionGroup) as caught:
            await target.has_ended()
        ended, rest = caught.value.split(InternalError)
        assert rest is None
        assert "CUDA error" in str(_leaf(ended))
        assert fault.num_failed == recovery.MAX_FAILED_PASSES + recovery.MAX_FAILED_SELF_TESTS


def _leaf(error: Any) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, BaseException)
    return error


async def test_a_draft_fails_and_recovers(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same rules as for the target."""
    monkeypatch.setattr(recovery, "MAX_FAILED_SELF_TESTS", 10_000)
    kind: type[ModelServiceConfig] = DraftConfig
    async with tier(kind) as draft:
        stub = draft_pb2_grpc.DraftServiceStub(draft.channel)
        async with raw(stub.Propose()) as stream:
            await has_states(stream, READY)
            fault.is_on = True
            for number in (1, 2, 3):
                opening = draft_open(number, PROMPT)
                commit = draft_commit(number, [7], len(PROMPT) + 1)
                await stream.write(draft_pb2.ProposeRequest(opens=[opening], commits=[commit]))
                answer = await stream.answer(number)
                assert answer.reason == draft_pb2.DraftLost.REASON_INTERNAL
            await has_states(stream, READY, FAILING)
            fault.is_on = False
            await has_states(stream, READY, FAILING, READY)


async def test_a_self_test_without_kv_room_is_repeated(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica neither returns nor ends, however often; it returns once there is room."""
    monkeypatch.setattr(recovery, "SELF_TEST_INTERVAL_S", 0.05)
    with capture_logs() as logs:
        async with tier(kv_cache_tokens=64) as target, target.verify() as stream:
            await has_states(stream, READY)

            async def ask(number: int) -> Any:
                opening = target_open(number, max_len=32)
                await stream.write(Frame(opens=[opening], rows=[row(number, 0, PROMPT)]))
                return await stream.answer(number)

            assert isinstance(await ask(1), target_pb2.VerifyResult)  # has a page of four
            fault.num_to_fail = recovery.MAX_FAILED_PASSES
            for number in (2, 3, 4):
                assert (await ask(number)).reason == Reason.REASON_INTERNAL

            async def was_repeated() -> bool:
                tries = [entry for entry in logs if entry["event"] == "self_test_without_room"]
                return len(tries) > 2 * recovery.MAX_FAILED_SELF_TESTS

            await eventually(was_repeated, TIMEOUT_S)
            assert stream.states == [READY, FAILING]
            await stream.write(Frame(closes=[{"generation_id": 1}]))
            await has_states(stream, READY, FAILING, READY)
