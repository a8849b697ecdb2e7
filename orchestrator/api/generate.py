"""Generate use case, the same for all transports: admission, session, prompt, quota, generation.

A transport translates and validates a request (`generation.validation`), enters
`Generate.generate` and sends the chunks that it iterates over.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Protocol

import structlog

from orchestrator.admission.api_keys import ApiClient
from orchestrator.admission.queue import AdmissionQueue
from orchestrator.admission.quota import Quota
from orchestrator.admission.ticket import AdmissionTicket
from orchestrator.generation.context import GenerationContext
from orchestrator.generation.generation import Generation
from orchestrator.generation.output import Chunk
from orchestrator.generation.preparation import Preparation, PreparedTurn
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.state import TokenOrigin
from orchestrator.generation.validation import ValidRequest, check_length
from orchestrator.replicas.models import Limits
from orchestrator.sessions import Lease, SessionRecord, unrecorded
from outrider.errors import InvalidRequest, OutriderError, Unavailable

log = structlog.get_logger()

# After stop_grace_s, running generations end after their current round. This is the time for it.
STOP_GRACE_S = 2.0


class RequestEvents(Protocol):
    """Receives a request's events before its first chunk, for logs, traces and metrics.

    `arrived_at`: when the request arrived (time.monotonic).
    """

    arrived_at: float

    def session_assigned(self, session_id: str) -> None:
        """The request has a session id: the client's, or a new one."""

    def started(self, num_prompt_tokens: int) -> None:
        """The request is admitted and has its session; its first verify request is sent next."""


class Chunks:
    """Async iterator over the chunks of a generation; charges their tokens to the client's quota.

    `request`: the request as it runs, with `params.max_tokens` resolved. `num_prompt_tokens`: of
    its whole context.
    """

    def __init__(
        self,
        chunks: AsyncIterator[Chunk],
        request: GenerationRequest,
        session_id: str,
        quota: Quota,
        num_prompt_tokens: int,
    ) -> None:
        self._chunks = chunks
        self._quota = quota
        self.request = request
        self.session_id = session_id
        self.num_prompt_tokens = num_prompt_tokens

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """Returns the next chunk. The call also reports that the previous chunk was sent."""
        chunk = await anext(self._chunks)
        # Replayed tokens of a resumed turn were charged when they were first sent.
        self._quota.spend(sum(token.origin is not TokenOrigin.REPLAYED for token in chunk.tokens))
        return chunk


class Generate:
    """The use case. One per orchestrator; used on the event loop only.

    `limits` returns the limits for a request that arrives now. `needs_redis` False: generations
    without a session run unrecorded while Redis is unreachable.
    """

    def __init__(
        self,
        context: GenerationContext,
        limits: Callable[[], Limits],
        admission: AdmissionQueue,
        *,
        needs_redis: bool = True,
    ) -> None:
        self.context = self._context = context
        self.limits = self._limits = limits
        self._admission = admission
        self._needs_redis = needs_redis
        self._running: set[Generation] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """Ends every generation after its current round, with finish reason CANCELLED."""
        self._is_stopping = True
        self._admission.close()
        for generation in self._running:
            generation.stop()

    @contextlib.asynccontextmanager
    async def generate(
        self,
        request: ValidRequest,
        client: ApiClient,
        events: RequestEvents,
        *,
        time_left_s: float | None = None,
    ) -> AsyncIterator[Chunks]:
        """Runs a generation while the block iterates over its chunks, to the last one.

        `time_left_s`: time until the client's deadline; None: no deadline. An error that ends the
        request is raised alone or in an ExceptionGroup. All resources are released in any case.
        """
        with self._context.cleanup.tracked():
            async with (
                self._admission.admitted(
                    request.priority,
                    time_left_s,
                    client=client.name,
                    min_priority=client.min_priority,
                ) as ticket,
                client.making(request.session_id if request.create_session else None),
            ):
                generation, chunks = await self._start(request, client, events, ticket)
                self._running.add(generation)
                if self._is_stopping:
                    generation.stop()
                try:
                    async with generation.running():
                        yield chunks
                finally:
                    self._running.discard(generation)

    async def _start(
        self,
        request: GenerationRequest,
        client: ApiClient,
        events: RequestEvents,
        ticket: AdmissionTicket,
    ) -> tuple[Generation, Chunks]:
        context = self._context
        await context.targets.acquire(context.timeouts.target_wait_s)
        assert context.targets.model is not None, "a target is connected"
        session_id = request.session_id or secrets.token_hex(8)
        events.session_assigned(session_id)
        model = context.targets.model.model_fingerprint
        lease = await self._acquire(request, client.name, session_id, model)
        prepared = None
        try:
            prepared = await self._prepare(request, lease.record, client.quota)
        finally:
            if prepared is None:
                await context.cleanup.shielded(self._release_unused(lease))
        num_prompt_tokens = len(prepared.turn.token_ids)
        events.started(num_prompt_tokens)
        generation = Generation(
            context,
            prepared,
            lease,
            ticket,
            arrived_at=events.arrived_at,
            check_length=lambda: check_length(prepared.request, num_prompt_tokens, self._limits()),
        )
        chunks = Chunks(
            generation, prepared.request, lease.session_id, client.quota, num_prompt_tokens
        )
        return generation, chunks

    async def _acquire(
        self, request: GenerationRequest, client: str, session_id: str, model: str
    ) -> Lease:
        """Acquires the session's lease. If cancelled, it leaves neither lease nor new session."""
        create = request.create_session or request.session_id is None
        takeover = request.resume_from is not None
        acquiring = asyncio.create_task(
            self._context.store.acquire(
                session_id, create=create, model=model, takeover=takeover, client=client
            )
        )
        try:
            return await asyncio.shield(acquiring)
        except Unavailable as error:
            if self._needs_redis or request.session_id is not None:
                raise
            log.warning("unrecorded", session_id=session_id, why=str(error))
            return unrecorded(session_id, model, client)
        except asyncio.CancelledError:
            await self._context.cleanup.shielded(self._undo(acquiring))
            raise

    async def _undo(self, acquiring: asyncio.Task[Lease]) -> None:
        with contextlib.suppress(OutriderError):
            await self._release_unused(await acquiring)

    async def _prepare(
        self, request: GenerationRequest, record: SessionRecord, quota: Quota
    ) -> PreparedTurn:
        """Prepares the turn and compiles its format.

        The encoded prompt is charged to the API key even if it is refused.
        """
        context = self._context
        preparation = Preparation(request, record, self._limits(), context.tokenizer)
        try:
            prepared = await context.encoding.run(preparation.run, preparation.num_chars)
        finally:
            quota.spend(preparation.num_encoded_tokens)
        structured = prepared.request.params.structured_outputs
        if structured is None:
            return prepared
        if context.grammars is None:
            why = "the tokenizer does not map tokens to bytes"
            raise InvalidRequest(structured.field, why)
        return replace(prepared, grammar=await context.grammars.compile(structured))

    async def _release_unused(self, lease: Lease) -> None:
        """Releases the lease of a turn that did not begin; deletes a session created for it."""
        if not lease.is_recorded:
            return
        record = lease.record
        try:
            await self._context.store.release(
                lease, target_kv=record.target_kv, draft_kv=record.draft_kv, delete=lease.created
            )
        except OutriderError as error:  # the lease then expires by itself
            log.warning("not_released", session_id=lease.session_id, why=str(error))
