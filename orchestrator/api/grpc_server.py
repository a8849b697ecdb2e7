"""The gRPC transport: requests to values, chunks and errors to messages. No logic of its own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import grpc

from orchestrator.admission.api_keys import current_client
from orchestrator.api.generate import Generate
from orchestrator.api.grpc_request import is_long, parse_page_token, parse_request
from orchestrator.api.grpc_response import (
    generate_response,
    pairing_response,
    session_response,
    sessions_response,
)
from orchestrator.api.request_telemetry import RequestTelemetry, TrackedRequest
from orchestrator.generation.context import GenerationContext
from orchestrator.replicas.models import Limits
from orchestrator.sessions import scoped_id, validate_session_id
from outrider.runtime.grpc_status import StreamWriter, translated
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """One per service; lives on the event loop.

    `limits`: of a request that arrives now. A stream whose client has not read for
    `write_timeout_s` ends.
    """

    def __init__(
        self,
        use_case: Generate,
        tiers: GenerationContext,
        limits: Callable[[], Limits],
        calls: RequestTelemetry,
        *,
        write_timeout_s: float,
    ) -> None:
        self._use_case = use_case
        self._tiers = tiers
        self._limits = limits
        self._calls = calls
        self._write_timeout_s = write_timeout_s

    async def Generate(self, request: orchestrator_pb2.GenerateRequest, context: Context) -> None:
        async with translated(context), self._calls.call(context) as call:
            await self._generate(request, call, context)

    async def _generate(
        self, request: orchestrator_pb2.GenerateRequest, call: TrackedRequest, context: Context
    ) -> None:
        parse = functools.partial(parse_request, request, self._limits(), self._tiers.tokenizer)
        asked = await self._tiers.encoding.check(parse) if is_long(request) else parse()
        writer = StreamWriter(context)
        async with (
            writer.beating(orchestrator_pb2.GenerateResponse(), request.heartbeat_ms),
            self._use_case.generate(
                asked, current_client(), call, time_left_s=context.time_remaining()
            ) as chunks,
            writer.watched(self._write_timeout_s),
        ):
            async for chunk in chunks:
                ready_at = time.monotonic()
                await writer.write(generate_response(chunk, chunks.session_id, chunks.request))
                call.sent(chunk, ready_at)

    async def GetSession(
        self, request: orchestrator_pb2.GetSessionRequest, context: Context
    ) -> orchestrator_pb2.GetSessionResponse | None:
        async with translated(context):
            validate_session_id(request.session_id)
            client = current_client().name
            return session_response(await self._tiers.store.get(request.session_id, client))
        return None

    async def ListSessions(
        self, request: orchestrator_pb2.ListSessionsRequest, context: Context
    ) -> orchestrator_pb2.ListSessionsResponse | None:
        async with translated(context):
            cursor = parse_page_token(request.page_token)
            return sessions_response(await self._tiers.store.page(cursor, current_client().name))
        return None

    async def DeleteSession(
        self, request: orchestrator_pb2.DeleteSessionRequest, context: Context
    ) -> orchestrator_pb2.DeleteSessionResponse | None:
        async with translated(context):
            validate_session_id(request.session_id)
            client = current_client()
            await self._tiers.store.delete(request.session_id, client.name)
            await client.deleted(request.session_id)
            for pool in (self._tiers.targets, self._tiers.drafts):
                if pool is not None:
                    pool.forget(scoped_id(request.session_id, client.name))
            return orchestrator_pb2.DeleteSessionResponse()
        return None

    async def GetModelInfo(
        self, request: orchestrator_pb2.GetModelInfoRequest, context: Context
    ) -> orchestrator_pb2.GetModelInfoResponse:
        drafts, limits = self._tiers.drafts, self._limits()
        links = list(drafts.links.values()) if drafts is not None else []
        answer = orchestrator_pb2.GetModelInfoResponse(
            target=self._tiers.targets.model,
            draft=drafts.model if drafts is not None and drafts.num_connected else None,
            default_gamma=limits.gamma,
            max_gamma=limits.max_gamma,
            draft_pairing=pairing_response(
                self._tiers.pairing.draft,
                [error for link in links if (error := link.refusal.error) is not None],
            ),
        )
        if request.with_token_hashes:
            answer.target.token_hashes = await self._tiers.pairing.token_hashes()
        return answer
