"""The generate use case, whatever the transport: admission, session, prompt, quota, generation.

A transport parses its own form into a GenerationRequest, enters `Generate.generate`, and sends the
chunks that it iterates over.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
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
from outrider.errors import OutriderError, Unavailable

log = structlog.get_logger()


class RequestEvents(Protocol):
    """What a transport learns of a request before its first chunk; for logs, traces, metrics.

    `asked_at`: when the request arrived (time.monotonic).
    """

    asked_at: float

    def in_session(self, session_id: str) -> None:
        """The session is known, given by the client or made for the request."""

    def began(self, num_prompt_tokens: int) -> None:
        """The request is admitted and has its session; its first verify request is next."""


class Chunks:
    """Chunks of one generation, charged to the client's quota as they leave.

    `request`: as it runs, with the server's defaults.
    """

    def __init__(
        self,
        chunks: AsyncIterator[Chunk],
        request: GenerationRequest,
        session_id: str,
        quota: Quota,
    ) -> None:
        self._chunks = chunks
        self._quota = quota
        self.request = request
        self.session_id = session_id

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk. Asking for it reports that the one before was sent."""
        chunk = await anext(self._chunks)
        # A resumed turn's tokens were charged when they were sent first.
        self._quota.spend(sum(token.origin is not TokenOrigin.EARLIER for token in chunk.tokens))
        return chunk


class Generate:
    """One per orchestrator; lives on the event loop.

    `limits`: of a request that arrives now. `needs_redis` False: generations without a session run
    unrecorded while Redis is away.
    """

    def __init__(
        self,
        tiers: GenerationContext,
        limits: Callable[[], Limits],
        admission: AdmissionQueue,
        *,
        needs_redis: bool = True,
    ) -> None:
        self._tiers = tiers
        self._limits = limits
        self._admission = admission
        self._needs_redis = needs_redis
        self._running: set[Generation] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """Ends every output after its round under way, with finish reason CANCELLED."""
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
        """Runs a generation for the time of a block, which iterates over its chunks to the last.

        `time_left_s`: until the client's deadline; None: it has none. Raises what ends the request
        early, alone or in an ExceptionGroup; whatever happens, all that it held is released.
        """
        with self._tiers.endings.of_call():
            async with (
                self._admission.admitted(
                    request.priority,
                    time_left_s,
                    client=client.name,
                    min_priority=client.min_priority,
                ) as place,
                client.making(request.session_id if request.create_session else None),
            ):
                generation, chunks = await self._begun(request, client, events, place)
                self._running.add(generation)
                if self._is_stopping:
                    generation.stop()
                try:
                    async with generation.running():
                        yield chunks
                finally:
                    self._running.discard(generation)

    async def _begun(
        self,
        request: GenerationRequest,
        client: ApiClient,
        events: RequestEvents,
        place: AdmissionTicket,
    ) -> tuple[Generation, Chunks]:
        tiers = self._tiers
        await tiers.targets.acquire(tiers.timing.target_wait_s)
        assert tiers.targets.model is not None, "a target is connected"
        session_id = request.session_id or secrets.token_hex(8)
        events.in_session(session_id)
        model = tiers.targets.model.model_fingerprint
        lease = await self._acquire(request, client.name, session_id, model)
        prepared = None
        try:
            prepared = await self._prepare(request, lease.record, client.quota)
        finally:
            if prepared is None:
                await tiers.endings.shielded(self._give_back(lease))
        num_prompt_tokens = len(prepared.turn.token_ids)
        events.began(num_prompt_tokens)
        generation = Generation(
            tiers,
            prepared,
            lease,
            place,
            asked_at=events.asked_at,
            check_length=lambda: check_length(prepared.request, num_prompt_tokens, self._limits()),
        )
        return generation, Chunks(generation, prepared.request, lease.session_id, client.quota)

    async def _acquire(
        self, asked: GenerationRequest, client: str, session_id: str, model: str
    ) -> Lease:
        """Cancelled meanwhile, it leaves neither a lease nor a session behind."""
        create = asked.create_session or asked.session_id is None
        takeover = asked.resume_from is not None
        acquiring = asyncio.create_task(
            self._tiers.store.acquire(
                session_id, create=create, model=model, takeover=takeover, client=client
            )
        )
        try:
            return await asyncio.shield(acquiring)
        except Unavailable as error:
            if self._needs_redis or asked.session_id is not None:
                raise
            log.warning("unrecorded", session_id=session_id, why=str(error))
            return unrecorded(session_id, model, client)
        except asyncio.CancelledError:
            await self._tiers.endings.shielded(self._undo(acquiring))
            raise

    async def _undo(self, acquiring: asyncio.Task[Lease]) -> None:
        with contextlib.suppress(OutriderError):
            await self._give_back(await acquiring)

    async def _prepare(
        self, request: GenerationRequest, record: SessionRecord, quota: Quota
    ) -> PreparedTurn:
        """Charges the prompt to the API key, also where it is refused once it is encoded."""
        tiers = self._tiers
        preparation = Preparation(request, record, self._limits(), tiers.tokenizer)
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
