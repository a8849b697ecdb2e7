"""Target client: sends verify requests to a target replica and receives their results.

Only this module uses target.proto here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np

from orchestrator.replicas.replica_stream import MODEL_INFO_TIMEOUT_S, ReplicaLink
from orchestrator.speculation.verification import PromptLogprobs, Proposal, VerifyResult
from outrider.errors import (
    InternalError,
    InvalidRequest,
    KVFull,
    KVLost,
    KVNeverFits,
    LeaseLost,
    NonFiniteLogits,
    OutriderError,
    ReplicaLost,
    Unavailable,
)
from outrider.runtime.protobuf import (
    FLOAT32,
    UINT16,
    UINT32,
    costs_from_proto,
    pack,
    sampling_to_proto,
    unpack,
)
from outrider.sampling.params import SamplingParams
from outrider.telemetry.tracing import current_span
from outrider.v1 import target_pb2, target_pb2_grpc

_ERRORS: dict[int, type[OutriderError]] = {
    target_pb2.RowError.REASON_KV_LOST: KVLost,
    target_pb2.RowError.REASON_KV_FULL: KVFull,
    target_pb2.RowError.REASON_KV_NEVER: KVNeverFits,
    target_pb2.RowError.REASON_DISPLACED: LeaseLost,
    target_pb2.RowError.REASON_DRAINING: Unavailable,
}

_EMPTY = np.zeros(0)
# Largest value of TargetOpen.age_ms, a field of 32 bits.
MAX_AGE_MS = 2**32 - 1

Item = target_pb2.TargetOpen | target_pb2.VerifyRow | target_pb2.TargetClose | str


@dataclass(frozen=True)
class TargetRequest:
    """Parameters of a generation for the target tier."""

    session_id: str
    epoch: int
    prompt_len: int
    max_len: int
    params: SamplingParams
    priority: int


class TargetHandle:
    """One generation at a target replica. Used by the generation's task only."""

    def __init__(self, link: TargetLink, generation_id: int, request: TargetRequest) -> None:
        self._link = link
        self._id = generation_id
        self._request = request
        self._num_logprobs = request.params.logprobs
        self._result: asyncio.Future[target_pb2.VerifyResult] | None = None
        # Why the generation ended at the replica; later requests fail with it.
        self._failure: OutriderError | None = None
        self._sent_at = 0.0
        # From the last verify request to the arrival of its result.
        self.latency_s = 0.0
        self.replica = link.endpoint
        self.wire_bytes = 0
        # Span of the request; None if it is not traced.
        self.span = current_span()
        self._gamma = 0
        self._has_prompt_logprobs = False

    def send_verify(
        self,
        keep_len: int,
        context_token_ids: Sequence[int],
        proposal: Proposal | None,
        *,
        with_prompt_logprobs: bool = False,
    ) -> None:
        """Send a verify request; `reply` awaits its result. One request at a time.

        `keep_len`: tokens of the context that the replica has and keeps; `context_token_ids`: those
        after them. `with_prompt_logprobs`: only with `keep_len` 0.
        """
        request = target_pb2.VerifyRow(
            generation_id=self._id,
            keep_len=keep_len,
            context_token_ids=pack(context_token_ids, UINT32),
            with_prompt_logprobs=with_prompt_logprobs,
        )
        self._has_prompt_logprobs = with_prompt_logprobs
        self._gamma = len(proposal.token_ids) if proposal is not None else 0
        if proposal is not None:
            request.draft_token_ids = pack(proposal.token_ids, UINT32)
            if proposal.supports is not None:
                ids = [support.token_ids for support in proposal.supports]
                request.support_sizes = pack([len(part) for part in ids], UINT16)
                request.support_ids = pack(np.concatenate(ids), UINT32)
        self._result = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            self._fail(self._failure)
        self._count(request)
        self._sent_at = time.monotonic()
        self._link.send(request)

    async def reply(self, proposal: Proposal | None, timeout_s: float) -> VerifyResult:
        """The result of the last verify request.

        Raises KVLost (send the request again with the whole context), KVFull (open the generation
        again when there is room), KVNeverFits, LeaseLost, InternalError, Unavailable (the replica
        takes no generations), ReplicaLost (it was lost during the request, or timed out),
        InvalidRequest (a sampling field that the target does not support).
        """
        assert self._result is not None, "a verify request was sent"
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._result
        except TimeoutError:
            self._link.mark_unresponsive()
            raise ReplicaLost(f"no verify result from the target within {timeout_s:g} s") from None
        try:
            parsed = self._parse(result, proposal)
            if self._has_prompt_logprobs:
                prompt = _prompt_logprobs(result, self._request)
                parsed = replace(parsed, prompt_logprobs=prompt)
        except (InvalidRequest, ValueError) as error:
            self._link.breaker.failed(str(error))
            message = "the target's verify result does not fit its request"
            raise InternalError(message, str(error)) from error
        self._link.breaker.succeeded()
        return parsed

    def close(self, *, keep: bool) -> None:
        """End the generation at the replica; `keep`: its KV stays for the session's next turn."""
        self._link.detach(self._id)
        closing = target_pb2.TargetClose(generation_id=self._id, keep=keep)
        self._count(closing)
        self._link.send(closing)

    def received(self, result: target_pb2.VerifyResult) -> None:
        """The result of the last verify request arrived."""
        self._count(result)
        if self._result is not None and not self._result.done():
            self.latency_s = time.monotonic() - self._sent_at
            if self.span is not None:
                self.span.round("verify", self._sent_at, gamma=self._gamma, replica=self.replica)
            self._result.set_result(result)

    def failed(self, error: target_pb2.RowError) -> None:
        """The replica failed a verify request; all but KVLost end the generation there."""
        if self._failure is not None:  # an error of a later request
            return
        failure: OutriderError
        if (kind := _ERRORS.get(error.reason)) is not None:
            failure = kind(f"the target: {error.detail}")
        elif error.detail == str(NonFiniteLogits()):
            failure = NonFiniteLogits()
        else:  # an unexpected exception there
            failure = InternalError("the target replica failed in this generation", error.detail)
        if error.detail.startswith("sampling."):  # a field that this target does not support
            failure = InvalidRequest(*error.detail.split(": ", 1))
        if isinstance(failure, InternalError):
            self._link.breaker.failed(error.detail)
        if not isinstance(failure, KVLost):
            self._failure = failure
        self._fail(failure)

    def link_lost(self, why: str) -> None:
        """No more results come: the current request and later ones fail."""
        message = "the target replica is lost, and no other one is available"
        self._failure = Unavailable(message, why)
        self._fail(ReplicaLost(message, why))

    def _fail(self, failure: OutriderError) -> None:
        if self._result is not None and not self._result.done():
            self._result.set_exception(failure)
            self._result.exception()  # no warning if nobody awaits it

    def _count(self, item: Any) -> None:
        self.wire_bytes += item.ByteSize()

    def _parse(self, result: target_pb2.VerifyResult, proposal: Proposal | None) -> VerifyResult:
        sent, left_out = self._gamma, result.num_left_out
        if left_out > sent:
            raise ValueError(f"{left_out} draft tokens left out of {sent}")
        if proposal is not None:
            proposal = proposal.run_without(left_out)
        gamma = len(proposal.token_ids) if proposal is not None else 0
        if self._num_logprobs is None and (proposal is None or proposal.supports is None):
            sample_ids = unpack(result.sample_ids, UINT32, "sample_ids").tolist()
            has_probs = result.support_probs or result.tail_mass or result.tail_logprobs
            if len(sample_ids) != gamma + 1 or has_probs:
                raise ValueError("wrong lengths")
            reused = result.num_reused_tokens
            return VerifyResult(sample_ids, (), _EMPTY, _EMPTY, result.step_s, reused, left_out)
        supports = (proposal.supports if proposal is not None else None) or ()
        splits = np.cumsum([len(support.token_ids) for support in supports])[:-1]
        parsed = VerifyResult(
            sample_ids=unpack(result.sample_ids, UINT32, "sample_ids").tolist(),
            support_probs=np.split(_floats(result.support_probs).astype(np.float64), splits),
            tail_mass=_floats(result.tail_mass).astype(np.float64),
            tail_logprobs=_floats(result.tail_logprobs).astype(np.float64),
            step_s=result.step_s,
            num_reused_tokens=result.num_reused_tokens,
            num_left_out=left_out,
        )
        num_rows = gamma if supports and left_out else gamma + 1
        num_support = sum(len(support.token_ids) for support in supports)
        lengths = (len(parsed.sample_ids), len(result.support_probs))
        tails = (len(parsed.tail_mass), len(parsed.tail_logprobs))
        if lengths != (num_rows, 4 * num_support) or (supports and tails != (gamma, gamma)):
            raise ValueError("wrong lengths")
        if self._num_logprobs is None:
            return parsed
        top_ids = unpack(result.top_ids, UINT32, "top_ids").astype(np.int64)
        return replace(
            parsed,
            support_logprobs=np.split(_floats(result.support_logprobs), splits),
            sample_logprobs=_floats(result.sample_logprobs),
            top_ids=top_ids.reshape(num_rows, -1),
            top_logprobs=_floats(result.top_logprobs).reshape(num_rows, -1),
        )


def _prompt_logprobs(result: target_pb2.VerifyResult, request: TargetRequest) -> PromptLogprobs:
    """Raises ValueError if the arrays have other sizes."""
    num, num_top = shape = request.prompt_len - 1, request.params.prompt_logprobs or 0
    top_ids = unpack(result.prompt_top_ids, UINT32, "prompt_top_ids").astype(np.int64)
    logprobs, top = _floats(result.prompt_logprobs), _floats(result.prompt_top_logprobs)
    ranks = unpack(result.prompt_ranks, UINT32, "prompt_ranks").astype(np.int64)
    lengths = (len(logprobs), len(top_ids), len(top), len(ranks) or num)
    if lengths != (num, num * num_top, num * num_top, num):
        raise ValueError("wrong lengths")
    return PromptLogprobs(logprobs, top_ids.reshape(shape), top.reshape(shape), ranks)


def _floats(data: bytes) -> Any:
    return unpack(data, FLOAT32, "verify result")


class TargetLink(ReplicaLink[Item, TargetHandle]):
    """Link to one target replica, shared by all generations of this orchestrator."""

    tier = "target"
    open_type = target_pb2.TargetOpen
    close_type = target_pb2.TargetClose

    def open(
        self, request: TargetRequest, *, kept_epoch: int, preempts: bool, age_s: float
    ) -> TargetHandle:
        """Open a generation; its first verify request may follow at once.

        `kept_epoch`: epoch of the session's KV from the turn before; 0: none is used. `preempts`:
        it may preempt less urgent and later generations. `age_s`: seconds since the request
        arrived. Raises Unavailable.
        """
        params = request.params
        handle = self.attach(lambda number: TargetHandle(self, number, request))
        opening = target_pb2.TargetOpen(
            generation_id=handle._id,
            session_id=request.session_id,
            epoch=request.epoch,
            kept_epoch=kept_epoch,
            prompt_len=request.prompt_len,
            max_len=request.max_len,
            sampling=sampling_to_proto(params),
            priority=request.priority,
            preempts=preempts,
            age_ms=min(int(1000 * age_s), MAX_AGE_MS),
            traceparent=handle.span.traceparent if handle.span is not None else "",
        )
        handle._count(opening)
        self.send(opening)
        return handle

    async def _ask_model(self, channel: grpc.aio.Channel, **fields: bool) -> Any:
        request = target_pb2.TargetServiceGetModelInfoRequest(**fields)
        stub = target_pb2_grpc.TargetServiceStub(channel)
        return await stub.GetModelInfo(request, timeout=MODEL_INFO_TIMEOUT_S)

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        return target_pb2_grpc.TargetServiceStub(channel).Verify()

    def _frame(self, items: list[Item]) -> target_pb2.VerifyRequest:
        return target_pb2.VerifyRequest(
            opens=[item for item in items if isinstance(item, target_pb2.TargetOpen)],
            rows=[item for item in items if isinstance(item, target_pb2.VerifyRow)],
            closes=[item for item in items if isinstance(item, target_pb2.TargetClose)],
            forget_session_ids=[item for item in items if isinstance(item, str)],
        )

    def _dispatch(self, frame: target_pb2.VerifyResponse) -> None:
        if frame.HasField("costs"):
            self.costs = costs_from_proto(frame.costs)
        for result in frame.results:
            if handle := self._handles.get(result.generation_id):
                handle.received(result)
        for error in frame.errors:
            if handle := self._handles.get(error.generation_id):
                handle.failed(error)
