"""A refused replica: delays between attempts, and an immediate one after a reconnect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

import orchestrator.replicas.refusal
from orchestrator.replicas.target_client import TargetLink
from outrider.cli.relay import Relay
from outrider.errors import IncompatiblePair
from outrider.v1 import draft_pb2_grpc, model_pb2, target_pb2, target_pb2_grpc
from tests.stack import eventually


class Target(target_pb2_grpc.TargetServiceServicer):
    """Serves GetModelInfo and counts its calls."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_calls = 0

    async def GetModelInfo(
        self, request: Any, context: Any
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        self.num_calls += 1
        model = model_pb2.ModelInfo(name=self._name)
        return target_pb2.TargetServiceGetModelInfoResponse(model=model)

    async def Verify(self, request_iterator: Any, context: Any) -> None:
        async for _ in request_iterator:
            pass


async def right_one(model: model_pb2.ModelInfo, _: Any) -> None:
    if model.name != "right":
        raise IncompatiblePair(f"the model is {model.name}")


@contextlib.asynccontextmanager
async def served(servicer: Target | None) -> AsyncIterator[int]:
    """Yields its port. None: serves a draft instead of a target."""
    server = grpc.aio.server()
    if servicer is None:
        draft_pb2_grpc.add_DraftServiceServicer_to_server(
            draft_pb2_grpc.DraftServiceServicer(), server
        )
    else:
        target_pb2_grpc.add_TargetServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def linked(endpoint: str) -> AsyncIterator[TargetLink]:
    link = TargetLink(endpoint, right_one, lambda: None)
    running = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        running.cancel()
        await asyncio.wait([running])


def refusals(logs: Any) -> list[str]:
    return [entry["why"] for entry in logs if entry["event"] == "replica_refused"]


async def test_the_delay_between_attempts_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a limit. The refusal is logged once."""
    monkeypatch.setattr(orchestrator.replicas.refusal, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(orchestrator.replicas.refusal, "MAX_RETRY_S", 0.05)
    waits: list[float] = []

    async def noted(model: model_pb2.ModelInfo, hashes: Any) -> None:
        waits.append(link.refusal.retry_s)
        await right_one(model, hashes)

    async with served(Target("wrong")) as port:
        with capture_logs() as logs:
            link = TargetLink(f"127.0.0.1:{port}", noted, lambda: None)
            running = asyncio.create_task(link.run())

            async def has_retried() -> bool:
                return len(waits) >= 6

            try:
                await eventually(has_retried)
            finally:
                running.cancel()
                await asyncio.wait([running])
    assert waits[:6] == [0.01, 0.02, 0.04, 0.05, 0.05, 0.05]
    assert refusals(logs) == ["the model is wrong"]
    assert link.condition == "refused"


async def test_a_new_process_at_the_address_is_tried_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not after the delay, which is an hour here."""
    monkeypatch.setattr(orchestrator.replicas.refusal, "FIRST_RETRY_S", 3600.0)
    monkeypatch.setattr(orchestrator.replicas.refusal, "MAX_RETRY_S", 3600.0)
    wrong, other, right = Target("wrong"), Target("other"), Target("right")
    with capture_logs() as logs:
        async with (
            served(wrong) as first,
            served(other) as second,
            served(right) as third,
            Relay("127.0.0.1", 0, "127.0.0.1", first, 0.0) as relay,
            linked(relay.address) as link,
        ):
            for number, port in ((1, second), (2, third)):

                async def is_refused(number: int = number) -> bool:
                    return len(refusals(logs)) == number

                await eventually(is_refused)
                relay.retarget("127.0.0.1", port)
                relay.reset()

            async def is_connected() -> bool:
                return link.is_connected

            await eventually(is_connected)
            assert link.condition == "ready"
    assert refusals(logs) == ["the model is wrong", "the model is other"]
    assert (wrong.num_calls, other.num_calls, right.num_calls) == (1, 1, 1)


async def test_a_server_that_rejects_requests_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A draft at the address of a target: the refusal is logged, and attempts are delayed."""
    monkeypatch.setattr(orchestrator.replicas.refusal, "FIRST_RETRY_S", 3600.0)
    monkeypatch.setattr(orchestrator.replicas.refusal, "MAX_RETRY_S", 3600.0)
    with capture_logs() as logs:
        async with served(None) as port, linked(f"127.0.0.1:{port}") as link:

            async def is_refused() -> bool:
                return link.condition == "refused"

            await eventually(is_refused)
    (why,) = refusals(logs)
    assert "UNIMPLEMENTED" in why
