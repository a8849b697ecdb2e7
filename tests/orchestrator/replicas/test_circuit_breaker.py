"""Circuit breaker of a replica, with a clock of the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

import target_service.app
from orchestrator.replicas.circuit_breaker import (
    FIRST_OPEN_S,
    MAX_FAILURES,
    MAX_OPEN_S,
    CircuitBreaker,
)
from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetHandle, TargetLink
from outrider.errors import InternalError
from outrider.runtime.protobuf import UINT32, pack
from outrider.settings.services import TargetConfig
from outrider.v1 import draft_pb2, draft_pb2_grpc, model_pb2, target_pb2, target_pb2_grpc
from tests.orchestrator.replicas.requests import draft_request, target_request
from tests.services.fake_draft import FakeDraft
from tests.stack import eventually


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened() -> tuple[CircuitBreaker, Clock]:
    clock = Clock()
    breaker = CircuitBreaker("target", "somewhere:1", lambda: None, clock)
    for _ in range(MAX_FAILURES):
        assert breaker.allows
        breaker.tried()
        breaker.failed("why")
    return breaker, clock


def test_consecutive_failures_open_the_circuit() -> None:
    breaker, _ = opened()
    assert breaker.is_open
    assert not breaker.allows


def test_a_success_resets_the_count_of_failures() -> None:
    breaker = CircuitBreaker("target", "somewhere:1", lambda: None)
    for _ in range(5):
        for _ in range(MAX_FAILURES - 1):
            breaker.failed("why")
        breaker.succeeded()
    assert breaker.allows
    assert not breaker.is_open


def test_one_generation_tries_the_replica_and_closes_the_circuit() -> None:
    breaker, clock = opened()
    clock.now += FIRST_OPEN_S
    assert breaker.allows
    breaker.tried()
    assert not breaker.allows, "the others wait for the outcome"
    breaker.succeeded()
    assert breaker.allows
    assert not breaker.is_open


def test_a_trial_without_outcome_is_followed_by_another() -> None:
    breaker, clock = opened()
    for _ in range(3):
        clock.now += FIRST_OPEN_S
        assert breaker.allows
        breaker.tried()


def test_failed_trials_double_the_delay() -> None:
    breaker, clock = opened()
    open_s = FIRST_OPEN_S
    for _ in range(10):
        clock.now += open_s
        assert breaker.allows
        breaker.tried()
        breaker.failed("why")
        open_s = min(2 * open_s, MAX_OPEN_S)
        clock.now += 0.99 * open_s
        assert not breaker.allows
        clock.now -= 0.99 * open_s


def test_failures_of_generations_opened_before_the_trial_do_not_extend_the_delay() -> None:
    breaker, clock = opened()
    for _ in range(20):
        breaker.failed("why")
    clock.now += FIRST_OPEN_S
    assert breaker.allows


def test_changes_are_reported() -> None:
    changes: list[bool] = []
    breaker = CircuitBreaker("target", "somewhere:1", lambda: changes.append(breaker.is_open))
    for _ in range(MAX_FAILURES + 3):
        breaker.failed("why")
    breaker.succeeded()
    breaker.succeeded()
    assert changes == [True, False]


async def fits(*_: object) -> None:
    """Every model fits."""


async def test_generations_do_not_wait_for_memory_of_a_replica_with_an_open_circuit() -> None:
    """Unless all circuits are open."""
    settings: dict[str, Any] = {"simulate": "step_ms=1,vocab_size=256", "port": 0}
    settings |= {"kv_cache_tokens": 1_024, "calibration_s": 0.0}
    async with (
        target_service.app.serving(TargetConfig(**settings)) as first,
        target_service.app.serving(TargetConfig(**settings)) as second,
    ):
        endpoints = [f"127.0.0.1:{server.port}" for server in (first, second)]
        pool = ReplicaPool(
            "target",
            lambda endpoint, on_change: TargetLink(endpoint, fits, on_change),
            endpoints,
        )
        async with pool.running():

            async def both_are_connected() -> bool:
                return pool.candidates(1_024) == set(endpoints)

            await eventually(both_are_connected)
            assert pool.candidates(1_025) == frozenset()
            for link in pool.links.values():
                link.breaker._clock = Clock()
            for broken, left in ((0, {endpoints[1]}), (1, set(endpoints))):
                for _ in range(MAX_FAILURES):
                    pool.links[endpoints[broken]].breaker.failed("a pass failed")
                assert pool.candidates(1_024) == left


class WrongResults(target_pb2_grpc.TargetServiceServicer):
    """Answers the first `num_wrong` verify requests with too many tokens, later ones correctly."""

    def __init__(self, num_wrong: int) -> None:
        self._num_wrong = num_wrong

    async def GetModelInfo(
        self, request: Any, context: Any
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        return target_pb2.TargetServiceGetModelInfoResponse()

    async def Verify(self, request_iterator: Any, context: Any) -> None:
        async for frame in request_iterator:
            for row in frame.rows:
                self._num_wrong -= 1
                num_tokens = 3 if self._num_wrong >= 0 else 1
                result = target_pb2.VerifyResult(
                    generation_id=row.generation_id, sample_ids=pack([7] * num_tokens, UINT32)
                )
                await context.write(target_pb2.VerifyResponse(results=[result]))


def opened_at(link: TargetLink) -> TargetHandle:
    """A generation whose first verify request was sent."""
    request = target_request("s", prompt_len=2)
    handle = link.open(request, kept_epoch=0, preempts=False, age_s=0.0)
    handle.send_verify(0, [1, 2], None)
    return handle


@contextlib.asynccontextmanager
async def linked(servicer: Any, link_type: Any, add: Any) -> AsyncIterator[Any]:
    """A connected link to a server of that servicer."""
    server = grpc.aio.server()
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = link_type(f"127.0.0.1:{port}", fits, lambda: None)
    running = asyncio.create_task(link.run())

    async def is_connected() -> bool:
        return bool(link.is_connected)

    try:
        await eventually(is_connected)
        yield link
    finally:
        running.cancel()
        await asyncio.wait([running])
        await server.stop(0)


async def test_verify_results_that_do_not_fit_open_the_circuit() -> None:
    """Three in a row. Each fails its generation with InternalError."""
    servicer = WrongResults(num_wrong=MAX_FAILURES)
    add = target_pb2_grpc.add_TargetServiceServicer_to_server
    async with linked(servicer, TargetLink, add) as link:
        link.breaker._clock = clock = Clock()
        for _ in range(MAX_FAILURES):
            assert not link.breaker.is_open
            handle = opened_at(link)
            with pytest.raises(InternalError, match="does not fit its request"):
                await handle.reply(None, 60.0)
            handle.close(keep=False)
        assert link.breaker.is_open
        assert not link.breaker.allows
        assert link.condition == "failing"
        clock.now += FIRST_OPEN_S
        handle = opened_at(link)
        assert (await handle.reply(None, 60.0)).sample_ids == [7]
        assert not link.breaker.is_open


async def test_bad_proposals_open_the_circuit() -> None:
    """Other draft replicas are then preferred."""
    num_wrong = [MAX_FAILURES]

    def answer(item: Any) -> list[draft_pb2.Proposal]:
        num_wrong[0] -= 1
        token_ids = pack([300 if num_wrong[0] >= 0 else 7], UINT32)  # vocab_size is 256
        proposal = draft_pb2.Proposal(
            generation_id=item.generation_id, base_len=2, token_ids=token_ids
        )
        return [proposal]

    fake = FakeDraft(model_pb2.ModelInfo(max_gamma=4), answer)
    add = draft_pb2_grpc.add_DraftServiceServicer_to_server
    async with linked(fake, DraftLink, add) as link:
        link.breaker._clock = clock = Clock()
        for _ in range(MAX_FAILURES):
            assert not link.breaker.is_open
            handle = _opened_draft(link)
            assert await handle.wait(60.0) is None
            assert "bad proposal" in handle.lost
        assert link.breaker.is_open
        clock.now += FIRST_OPEN_S
        proposal = await _opened_draft(link).wait(60.0)
        assert proposal.token_ids == (7,)
        assert not link.breaker.is_open


def _opened_draft(link: DraftLink) -> Any:
    return link.open(draft_request([1, 2]), gamma=4, lookahead=1)
