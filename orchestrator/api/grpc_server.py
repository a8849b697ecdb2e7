"""The callers' gRPC edge: requests in, chunks out. Knows no rounds and no tier's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from orchestrator.admission.api_keys import current_caller
from orchestrator.admission.place import Place
from orchestrator.admission.queue import Admission
from orchestrator.api.call_telemetry import Call, Calls
from orchestrator.api.grpc_request import parse_page_token, parse_request
from orchestrator.api.grpc_response import (
    generate_response,
    pairing_response,
    session_response,
    sessions_response,
)
from orchestrator.generation.context import Tiers
from orchestrator.generation.generation import Generation
from orchestrator.generation.preparation import Preparation, PreparedTurn
from orchestrator.generation.recorder import Chunk
from orchestrator.generation.request import GenerationRequest, check_length, resolve_max_tokens
from orchestrator.generation.result import Result
from orchestrator.generation.resume import Resumed, resumed, unanswered
from orchestrator.generation.state import Commitment, FinishReason, TokenOrigin
from orchestrator.replicas.models import Limits
from orchestrator.sessions import Lease, SessionRecord, scoped_id, unrecorded, validate_session_id
from outrider.errors import OutriderError, Unavailable
from outrider.runtime.grpc_status import StreamWriter, translated
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """One per service; lives on the event loop."""

    def __init__(
        self,
        tiers: Tiers,
        limits: Callable[[], Limits],
        admission: Admission,
        calls: Calls,
        *,
        write_timeout_s: float,
        needs_redis: bool = True,
    ) -> None:
        """`limits`: of a request that comes now.

        `needs_redis` False: one-off generations go unrecorded while it is away. A stream whose
        client has not read for `write_timeout_s` ends.
        """
        self._tiers = tiers
        self._limits = limits
        self._admission = admission
        self._calls = calls
        self._write_timeout_s = write_timeout_s
        self._needs_redis = needs_redis
        self._running: set[Generation] = set()
        self._is_stopping = False

    def stop_generations(self) -> None:
        """Ends every output after its round under way, with finish reason CANCELLED."""
        self._is_stopping = True
        self._admission.close()
        for generation in self._running:
            generation.stop()

    async def Generate(self, request: orchestrator_pb2.GenerateRequest, context: Context) -> None:
        with self._tiers.endings.of_call():
            async with translated(context), self._calls.call(context) as call:
                await self._admitted(request, call, context)

    async def _admitted(
        self, request: orchestrator_pb2.GenerateRequest, call: Call, context: Context
    ) -> None:
        parse = functools.partial(parse_request, request, self._limits(), self._tiers.tokenizer)
        asked = await self._tiers.encoding.check(parse) if is_long(request) else parse()
        caller, writer = current_caller(), StreamWriter(context)
        heartbeat = orchestrator_pb2.GenerateResponse()
        async with (
            writer.beating(heartbeat, request.heartbeat_ms),
            self._admission.admitted(
                asked.priority,
                context.time_remaining(),
                caller=caller.name,
                min_priority=caller.min_priority,
            ) as place,
            caller.making(asked.session_id if asked.create_session else None),
        ):
            await self._generate(asked, place, call, writer)

    async def _generate(
        self, asked: GenerationRequest, place: Place, call: Call, writer: StreamWriter
    ) -> None:
        tiers = self._tiers
        await tiers.targets.acquire(tiers.timing.target_wait_s)
        assert tiers.targets.model is not None, "a target is connected"
        session_id = asked.session_id or secrets.token_hex(8)
        call.in_session(session_id)
        lease = await self._acquire(asked, session_id, tiers.targets.model.model_fingerprint)
        generation = None
        try:
            generation = await self._begin(asked, lease, place, call, writer)
        finally:
            if generation is None:
                await tiers.endings.shielded(self._give_back(lease))
        self._running.add(generation)
        if self._is_stopping:
            generation.stop()
        try:
            async with writer.watched(self._write_timeout_s):
                await generation.run()
        finally:
            self._running.discard(generation)

    async def _acquire(self, asked: GenerationRequest, session_id: str, model: str) -> Lease:
        """A caller that leaves meanwhile leaves neither a lease nor a session behind."""
        create = asked.create_session or asked.session_id is None
        takeover = asked.resume_from is not None
        caller = current_caller().name
        acquiring = asyncio.create_task(
            self._tiers.store.acquire(
                session_id, create=create, model=model, takeover=takeover, caller=caller
            )
        )
        try:
            return await asyncio.shield(acquiring)
        except Unavailable as error:
            if self._needs_redis or asked.session_id is not None:
                raise
            log.warning("unrecorded", session_id=session_id, why=str(error))
            return unrecorded(session_id, model, caller)
        except asyncio.CancelledError:
            await self._tiers.endings.shielded(self._undo(acquiring))
            raise

    async def _undo(self, acquiring: asyncio.Task[Lease]) -> None:
        with contextlib.suppress(OutriderError):
            await self._give_back(await acquiring)

    async def _begin(
        self,
        asked: GenerationRequest,
        lease: Lease,
        place: Place,
        call: Call,
        writer: StreamWriter,
    ) -> Generation:
        prepared = await self._prepare(asked, lease.record)
        asked, num_prompt_tokens = prepared.request, len(prepared.turn.token_ids)
        quota = current_caller().quota

        async def write(chunk: Chunk, result: Result | None) -> None:
            # A resumed turn's tokens were charged when they were sent first.
            quota.spend(sum(token.origin is not TokenOrigin.EARLIER for token in chunk.tokens))
            ready_at = time.monotonic()
            await writer.write(generate_response(chunk, result, lease.session_id, asked))
            call.sent(chunk, result, ready_at)

        call.began(num_prompt_tokens)
        return Generation(
            self._tiers,
            prepared,
            lease,
            place,
            asked_at=call.asked_at,
            write=write,
            check_length=lambda: check_length(asked, num_prompt_tokens, self._limits()),
        )

    async def _prepare(self, asked: GenerationRequest, record: SessionRecord) -> PreparedTurn:
        """Charges the prompt to the API key, also where it is refused once it is encoded."""
        tiers, quota = self._tiers, current_caller().quota
        preparation = Preparation(asked, record, self._limits(), tiers.tokenizer)
        try:
            return await tiers.encoding.run(preparation.run, preparation.num_chars)
        finally:
            quota.spend(preparation.num_encoded_tokens)

    async def _give_back(self, lease: Lease) -> None:
        """The turn did not begin: the session is as it was, and one that was made for it goes."""
        if not lease.is_recorded:
            return
        record = lease.record
        try:
            await self._tiers.store.release(
                lease, target_kv=record.target_kv, draft_kv=record.draft_kv, delete=lease.created
            )
        except OutriderError as error:  # the lease lapses by itself
            log.warning("not_released", session_id=lease.session_id, why=str(error))

    async def GetSession(
        self, request: orchestrator_pb2.GetSessionRequest, context: Context
    ) -> orchestrator_pb2.GetSessionResponse | None:
        async with translated(context):
            validate_session_id(request.session_id)
            caller = current_caller().name
            return session_response(await self._tiers.store.get(request.session_id, caller))
        return None

    async def ListSessions(
        self, request: orchestrator_pb2.ListSessionsRequest, context: Context
    ) -> orchestrator_pb2.ListSessionsResponse | None:
        async with translated(context):
            cursor = parse_page_token(request.page_token)
            return sessions_response(await self._tiers.store.page(cursor, current_caller().name))
        return None

    async def DeleteSession(
        self, request: orchestrator_pb2.DeleteSessionRequest, context: Context
    ) -> orchestrator_pb2.DeleteSessionResponse | None:
        async with translated(context):
            validate_session_id(request.session_id)
            caller = current_caller()
            await self._tiers.store.delete(request.session_id, caller.name)
            await caller.deleted(request.session_id)
            for pool in (self._tiers.targets, self._tiers.drafts):
                if pool is not None:
                    pool.forget(scoped_id(request.session_id, caller.name))
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
