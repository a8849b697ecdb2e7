"""Clients of the services under attack: what they hold, and how it is given back.

Owns the channels. Knows nothing of hostile messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outrider.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
)

SERVICES = ("target", "draft", "orchestrator")
SETTLE_S = 60.0
_FORGET_AT_ONCE = 1_000
# Longer fingerprints are refused.
_MAX_NAME_CHARS = 1_024
# The client's own limits must not save the server from a message.
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

Load = Any


class Fronts:
    """By the services' names; those that are not there are not asked."""

    def __init__(self, channels: Mapping[str, Any]) -> None:
        self.channels = dict(channels)

    @property
    def target(self) -> Any:
        return target_pb2_grpc.TargetServiceStub(self.channels["target"])

    @property
    def draft(self) -> Any:
        return draft_pb2_grpc.DraftServiceStub(self.channels["draft"])

    @property
    def orchestrator(self) -> Any:
        return orchestrator_pb2_grpc.OrchestratorServiceStub(self.channels["orchestrator"])

    async def loads(self, service: str) -> list[Load]:
        """Of the tiers that hold something for the service."""
        is_tier = service != "orchestrator"
        loads = []
        if service == "target" or not is_tier:
            asked = target_pb2.TargetServiceGetModelInfoRequest()
            loads.append((await self.target.GetModelInfo(asked)).load)
        if service == "draft" or not is_tier:
            info = await self.draft.GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest())
            loads.append(info.load)
        return loads

    async def is_serving(self, service: str) -> bool:
        health = health_pb2_grpc.HealthStub(self.channels[service])
        answer = await health.Check(health_pb2.HealthCheckRequest())
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def forget(self, service: str, session_ids: set[str], fingerprints: set[str]) -> None:
        """Frees what is cached for these sessions: of all these targets, if at the draft."""
        names = sorted(name for name in session_ids if 1 <= len(name) <= 128)
        if service == "orchestrator":
            for name in names:
                await self._delete(name)
            return
        parts = [
            names[start : start + _FORGET_AT_ONCE]
            for start in range(0, len(names), _FORGET_AT_ONCE)
        ]
        frames: list[Any]
        if service == "target":
            call = self.target.Verify()
            frames = [target_pb2.VerifyRequest(forget_session_ids=part) for part in parts]
        else:
            call = self.draft.Propose()
            targets = [draft_pb2.DraftTarget(model_fingerprint=f) for f in sorted(fingerprints)]
            frames = [
                draft_pb2.ProposeRequest(target=target, forget_session_ids=part)
                for target in targets
                for part in parts
                if len(target.model_fingerprint) <= _MAX_NAME_CHARS
            ]
        for frame in frames:
            await call.write(frame)
        await call.done_writing()
        async for _ in call:
            pass

    async def _delete(self, name: str) -> None:
        """Waits for a generation that is still being given up."""
        asked = orchestrator_pb2.DeleteSessionRequest(session_id=name)
        async with asyncio.timeout(SETTLE_S):
            while True:
                try:
                    await self.orchestrator.DeleteSession(asked)
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.ABORTED:
                        return
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def connected(addresses: Mapping[str, str]) -> AsyncIterator[Fronts]:
    """`addresses`: host:port by name."""
    async with contextlib.AsyncExitStack() as stack:
        yield Fronts(
            {
                name: await stack.enter_async_context(
                    grpc.aio.insecure_channel(address, options=_OPTIONS)
                )
                for name, address in addresses.items()
            }
        )
