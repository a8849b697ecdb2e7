"""gRPC transport: translates requests to plain values, and chunks and errors to messages."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from orchestrator.admission.api_keys import current_client
from orchestrator.api.generate import Generate
from orchestrator.api.grpc_request import is_long, parse_page_token, parse_request
from orchestrator.api.grpc_response import (
    audit_response,
    generate_response,
    pairing_response,
    rollout_response,
    session_response,
    sessions_response,
)
from orchestrator.api.request_telemetry import ApiTelemetry, RequestTelemetry
from orchestrator.audit.auditor import Auditor
from orchestrator.generation.context import GenerationContext
from orchestrator.replicas.models import Limits
from orchestrator.replicas.pool import pooled_model
from orchestrator.replicas.rollout import DraftRollout
from orchestrator.sessions import scoped_id, validate_session_id
from outrider.draft_rollout import revision_name
from outrider.runtime.grpc_status import StreamWriter, translated
from outrider.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """gRPC handlers of the orchestrator. One per service; used on the event loop only.

    `limits` returns the limits for a request that arrives now. A stream ends when its client has
    not read for `write_timeout_s`.
    """

    def __init__(
        self,
        use_case: Generate,
        resources: GenerationContext,
        limits: Callable[[], Limits],
        telemetry: ApiTelemetry,
        auditor: Auditor,
        *,
        write_timeout_s: float,
    ) -> None:
        self._use_case = use_case
        self._resources = resources
        self._limits = limits
        self._telemetry = telemetry
        self._auditor = auditor
        self._write_timeout_s = write_timeout_s

    async def Generate(self, request: orchestrator_pb2.GenerateRequest, context: Context) -> None:
        headers = {key: str(value) for key, value in context.invocation_metadata() or ()}
        telemetry = self._telemetry.of_request(headers, context.time_remaining)
        async with translated(context), telemetry as events:
            await self._generate(request, events, context)

    async def _generate(
        self, message: orchestrator_pb2.GenerateRequest, events: RequestTelemetry, context: Context
    ) -> None:
        resources = self._resources
        parse = functools.partial(parse_request, message, self._limits(), resources.tokenizer)
        request = await resources.encoding.check(parse) if is_long(message) else parse()
        writer = StreamWriter(context)
        async with (
            writer.heartbeats(orchestrator_pb2.GenerateResponse(), message.heartbeat_ms),
            self._use_case.generate(
                request, current_client(), events, time_left_s=context.time_remaining()
            ) as chunks,
            writer.write_timeout(self._write_timeout_s),
        ):
            async for chunk in chunks:
                ready_at = time.monotonic()
                await writer.write(generate_response(chunk, chunks.session_id, chunks.request))
                events.sent(chunk, ready_at)

    async def GetSession(
        self, request: orchestrator_pb2.GetSessionRequest, context: Context
    ) -> orchestrator_pb2.GetSessionResponse | None:
        async with translated(context):
            validate_session_id(request.session_id)
            client = current_client().name
            return session_response(await self._resources.store.get(request.session_id, client))
        return None

    async def ListSessions(
        self, request: orchestrator_pb2.ListSessionsRequest, context: Context
    ) -> orchestrator_pb2.ListSessionsResponse | None:
        async with translated(context):
            cursor = parse_page_token(request.page_token)
            return sessions_response(
                await self._resources.store.page(cursor, current_client().name)
            )
        return None

    async def DeleteSession(
        self, request: orchestrator_pb2.DeleteSessionRequest, context: Context
    ) -> orchestrator_pb2.DeleteSessionResponse | None:
        async with translated(context):
            validate_session_id(request.session_id)
            client = current_client()
            await self._resources.store.delete(request.session_id, client.name)
            await client.deleted(request.session_id)
            for pool in (self._resources.targets, self._resources.drafts):
                if pool is not None:
                    pool.forget(scoped_id(request.session_id, client.name))
            return orchestrator_pb2.DeleteSessionResponse()
        return None

    async def GetModelInfo(
        self, request: orchestrator_pb2.GetModelInfoRequest, context: Context
    ) -> orchestrator_pb2.GetModelInfoResponse:
        resources, limits = self._resources, self._limits()
        drafts = resources.drafts
        links = list(drafts.links.values()) if drafts is not None else []
        models = drafts.models if drafts is not None else []
        rollout = resources.rollout
        response = orchestrator_pb2.GetModelInfoResponse(
            target=resources.targets.model,
            draft=_current(models, rollout),
            default_gamma=limits.gamma,
            max_gamma=limits.max_gamma,
            draft_pairing=pairing_response(
                resources.pairing.draft,
                [error for link in links if (error := link.refusal.error) is not None],
            ),
            draft_rollout=rollout_response(rollout, models) if rollout is not None else None,
        )
        if request.with_token_hashes:
            response.target.token_hashes = await resources.pairing.token_hashes()
        return response

    async def GetAudit(
        self, request: orchestrator_pb2.GetAuditRequest, context: Context
    ) -> orchestrator_pb2.GetAuditResponse:
        return audit_response(self._auditor, current_client().name)


def _current(
    models: Sequence[model_pb2.ModelInfo], rollout: DraftRollout | None
) -> model_pb2.ModelInfo | None:
    """The current draft revision, or all of them if it is not connected; None without a draft."""
    if not models or rollout is None:
        return None
    current = [m for m in models if revision_name(m.model_fingerprint) == rollout.record.current]
    return pooled_model(current or models)
