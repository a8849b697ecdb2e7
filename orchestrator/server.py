"""The callers' gRPC edge: requests in, chunks out. Knows no rounds and no tier's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from dataclasses import asdict, replace
from typing import Any

import grpc
import structlog

from orchestrator.admission import Admission, Place
from orchestrator.call import Call, Calls
from orchestrator.callers import current_caller
from orchestrator.conversation import PromptTooLong, Turn, build_turn, num_chars
from orchestrator.emitter import Chunk
from orchestrator.gamma import GammaDecision
from orchestrator.generation import Generation
from orchestrator.request import GenerationRequest, Limits, parse_request, resolve_max_tokens
from orchestrator.result import Result
from orchestrator.resume import Resumed, resumed
from orchestrator.session import EmittedToken, FinishReason, TokenOrigin
from orchestrator.store import (
    KvHandle,
    Lease,
    SessionRecord,
    scoped_id,
    unrecorded,
    validate_session_id,
)
from orchestrator.tiers import Tiers
from outrider.errors import OutriderError, Unavailable
from outrider.rpc import translated
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from outrider.wire import verification_to_proto

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

_ORIGINS = {
    TokenOrigin.ACCEPTED: orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED,
    TokenOrigin.RECOVERED: orchestrator_pb2.TOKEN_ORIGIN_RECOVERED,
    TokenOrigin.BONUS: orchestrator_pb2.TOKEN_ORIGIN_BONUS,
    TokenOrigin.PLAIN: orchestrator_pb2.TOKEN_ORIGIN_PLAIN,
    TokenOrigin.EARLIER: orchestrator_pb2.TOKEN_ORIGIN_UNSPECIFIED,
}
_FINISH_REASONS = {
    FinishReason.STOP: orchestrator_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: orchestrator_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: orchestrator_pb2.FINISH_REASON_CANCELLED,
}


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """One per service; lives on the event loop."""

    def __init__(
        self,
        tiers: Tiers,
        limits: Limits,
        admission: Admission,
        calls: Calls,
        *,
        needs_redis: bool = True,
    ) -> None:
        """`needs_redis` False: one-off generations go unrecorded while it is away."""
        self._tiers = tiers
        self._limits = limits
        self._admission = admission
        self._calls = calls
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
        async with translated(context), self._calls.call(context) as call:
            asked = parse_request(request, self._limits, self._tiers.tokenizer)
            async with self._admission.admitted(asked.priority, context.time_remaining()) as place:
                await self._generate(asked, place, call, context)

    async def _generate(
        self, asked: GenerationRequest, place: Place, call: Call, context: Context
    ) -> None:
        tiers = self._tiers
        await tiers.targets.acquire(tiers.timing.target_wait_s)
        assert tiers.targets.model is not None, "a target is connected"
        session_id = asked.session_id or secrets.token_hex(8)
        call.in_session(session_id)
        lease = await self._acquire(asked, session_id, tiers.targets.model.model_fingerprint)
        generation = None
        try:
            generation = await self._begin(asked, lease, place, call, context)
        finally:
            if generation is None:
                await asyncio.shield(self._give_back(lease))
        self._running.add(generation)
        if self._is_stopping:
            generation.stop()
        try:
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
            with contextlib.suppress(OutriderError):
                await self._give_back(await asyncio.shield(acquiring))
            raise

    async def _begin(
        self,
        asked: GenerationRequest,
        lease: Lease,
        place: Place,
        call: Call,
        context: Context,
    ) -> Generation:
        tiers, earlier = self._tiers, None
        if asked.resume_from is not None:
            earlier = resumed(lease.record, asked.resume_from)
            turn, asked = earlier.turn, self._fitted(earlier)
        else:
            turn = await self._build_turn(asked, lease.record)
            asked = resolve_max_tokens(asked, len(turn.token_ids), self._limits)

        quota = current_caller().quota

        async def write(chunk: Chunk, result: Result | None) -> None:
            # A resumed turn's tokens were charged when they were sent first.
            quota.spend(sum(token.origin is not TokenOrigin.EARLIER for token in chunk.tokens))
            ready_at = time.monotonic()
            await context.write(_response(chunk, result, lease.session_id, asked))
            call.sent(chunk, result, ready_at)

        call.began(len(turn.token_ids))
        return Generation(
            tiers, asked, lease, turn, place, asked_at=call.asked_at, write=write, resumed=earlier
        )

    async def _build_turn(self, asked: GenerationRequest, record: SessionRecord) -> Turn:
        """Charges the prompt to the key, also where it is refused once it is encoded."""
        quota = current_caller().quota
        build = functools.partial(
            build_turn, asked, record, self._tiers.tokenizer, self._limits.max_context_len
        )
        try:
            turn = await self._tiers.encoding.run(build, num_chars(asked, record))
        except PromptTooLong as error:
            quota.spend(error.num_tokens)
            raise
        quota.spend(len(turn.token_ids) - turn.keep_len)
        return turn

    def _fitted(self, earlier: Resumed) -> GenerationRequest:
        """The orchestrator it was begun at may have taken more draft tokens a round."""
        request, most = earlier.request, self._limits.max_gamma
        gamma = None if request.gamma is None else min(request.gamma, most)
        return replace(request, gamma=gamma, max_gamma=min(request.max_gamma, most))

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
            return _session(await self._tiers.store.get(request.session_id, caller))
        return None

    async def DeleteSession(
        self, request: orchestrator_pb2.DeleteSessionRequest, context: Context
    ) -> orchestrator_pb2.DeleteSessionResponse | None:
        async with translated(context):
            validate_session_id(request.session_id)
            caller = current_caller().name
            await self._tiers.store.delete(request.session_id, caller)
            for pool in (self._tiers.targets, self._tiers.drafts):
                if pool is not None:
                    pool.forget(scoped_id(request.session_id, caller))
            return orchestrator_pb2.DeleteSessionResponse()
        return None

    async def GetModelInfo(
        self, request: orchestrator_pb2.GetModelInfoRequest, context: Context
    ) -> orchestrator_pb2.GetModelInfoResponse:
        drafts = self._tiers.drafts
        return orchestrator_pb2.GetModelInfoResponse(
            target=self._tiers.targets.model,
            draft=drafts.model if drafts is not None and drafts.num_connected else None,
            default_gamma=self._limits.gamma,
            max_gamma=self._limits.max_gamma,
        )


def _response(
    chunk: Chunk, result: Result | None, session_id: str, asked: GenerationRequest
) -> orchestrator_pb2.GenerateResponse:
    return orchestrator_pb2.GenerateResponse(
        session_id=session_id,
        token_ids=[token.token_id for token in chunk.tokens],
        text=chunk.text,
        text_ends=chunk.text_ends,
        origins=[_ORIGINS[token.origin] for token in chunk.tokens],
        logprobs=[_logprobs(token) for token in chunk.tokens if token.logprobs is not None],
        result=_result(result, asked) if result else None,
    )


def _logprobs(token: EmittedToken) -> orchestrator_pb2.TokenLogprobs:
    assert token.logprobs is not None, "asked for"
    return orchestrator_pb2.TokenLogprobs(
        logprob=token.logprobs.logprob,
        top_ids=token.logprobs.top_ids,
        top_logprobs=token.logprobs.top_logprobs,
    )


def _result(result: Result, asked: GenerationRequest) -> orchestrator_pb2.GenerateResult:
    finish, counts = result.finish, result.counts
    return orchestrator_pb2.GenerateResult(
        finish_reason=_FINISH_REASONS[finish.reason],
        stop_text=finish.stop_text,
        stop_token_id=finish.stop_token_id,
        eos_token_id=finish.eos_token_id,
        usage=orchestrator_pb2.Usage(
            prompt_tokens=result.num_prompt_tokens,
            completion_tokens=result.num_completion_tokens,
            cached_tokens=result.num_cached_tokens,
        ),
        speculation=orchestrator_pb2.SpeculationStats(
            num_drafts=counts.num_drafts,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
            num_accepted_tokens_per_pos=counts.num_accepted_per_pos,
            num_rejected_tokens=counts.num_rejected_tokens,
            acceptance_rate=counts.acceptance_rate,
            mean_acceptance_length=counts.mean_acceptance_length,
            num_rounds=counts.num_rounds,
            time_to_first_token_s=result.time_to_first_token_s,
            duration_s=result.duration_s,
            tokens_per_s=result.tokens_per_s,
            gamma=asked.gamma,
            verification=verification_to_proto(asked.verification),
            draft_wire_bytes=result.draft_wire_bytes,
            target_wire_bytes=result.target_wire_bytes,
            num_lookahead_hits=result.num_lookahead_hits,
            num_rounds_per_gamma=counts.num_rounds_per_gamma,
            target_step_s=result.target_step_s,
            verify_s=result.verify_s,
            draft_wait_s=result.draft_wait_s,
            decision=_decision(result.decision) if result.decision else None,
        ),
        seed=asked.params.seed,
        recorded=result.recorded,
    )


def _decision(decision: GammaDecision) -> orchestrator_pb2.GammaDecision:
    said = asdict(decision)
    del said["wait_s"]
    return orchestrator_pb2.GammaDecision(**said)


def _session(record: SessionRecord) -> orchestrator_pb2.GetSessionResponse:
    return orchestrator_pb2.GetSessionResponse(
        session_id=record.session_id,
        token_ids=record.token_ids.tolist(),
        in_use=record.in_use,
        epoch=record.epoch,
        num_turns=record.num_turns,
        num_drafts=record.counters.num_drafts,
        num_draft_tokens=record.counters.num_draft_tokens,
        num_accepted_tokens=record.counters.num_accepted_tokens,
        num_emitted_tokens=record.counters.num_emitted_tokens,
        target_kv=_kv(record.target_kv),
        draft_kv=_kv(record.draft_kv),
        expires_in_s=record.expires_in_s,
    )


def _kv(handle: KvHandle | None) -> orchestrator_pb2.KvHandle | None:
    if handle is None:
        return None
    return orchestrator_pb2.KvHandle(
        replica=handle.replica, epoch=handle.epoch, cached_len=handle.cached_len
    )
