"""The target's client: rows out, replies in. The only place here that knows target.proto."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np

from orchestrator.replicas.replica_stream import MODEL_INFO_TIMEOUT_S, ReplicaLink
from orchestrator.speculation.verification import Proposal, VerifyResult
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

_NOTHING = np.zeros(0)
# A generation that is older counts as no older than this: the field has 32 bits.
MAX_AGE_MS = 2**32 - 1

Item = target_pb2.TargetOpen | target_pb2.VerifyRow | target_pb2.TargetClose | str


@dataclass(frozen=True)
class TargetRequest:
    """What the target tier has to know of a generation."""

    session_id: str
    epoch: int
    prompt_len: int
    max_len: int
    params: SamplingParams
    priority: int


class TargetHandle:
    """One generation at the target. Used by its generation's task only."""

    def __init__(self, link: TargetLink, generation_id: int, num_logprobs: int | None) -> None:
        self._link = link
        self._id = generation_id
        self._num_logprobs = num_logprobs
        self._answer: asyncio.Future[target_pb2.VerifyResult] | None = None
        self._failure: OutriderError | None = None
        self._sent_at = 0.0
        # From the row sent last to its answer, however late somebody asks for it.
        self.latency_s = 0.0
        self.replica = link.endpoint
        self.wire_bytes = 0
        # Of the request, where it is traced.
        self.span = current_span()
        self._gamma = 0

    def send_verify(
        self, keep_len: int, context_token_ids: Sequence[int], proposal: Proposal | None
    ) -> None:
        """Sends a row at once; `reply` awaits its answer. One row at a time."""
        row = target_pb2.VerifyRow(
            generation_id=self._id,
            keep_len=keep_len,
            context_token_ids=pack(context_token_ids, UINT32),
        )
        self._gamma = len(proposal.token_ids) if proposal is not None else 0
        if proposal is not None:
            row.draft_token_ids = pack(proposal.token_ids, UINT32)
            if proposal.supports is not None:
                ids = [support.token_ids for support in proposal.supports]
                row.support_sizes = pack([len(part) for part in ids], UINT16)
                row.support_ids = pack(np.concatenate(ids), UINT32)
        self._answer = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            self._fail(self._failure)
        self._count(row)
        self._sent_at = time.monotonic()
        self._link.send(row)

    async def reply(self, proposal: Proposal | None, timeout_s: float) -> VerifyResult:
        """The answer to the row sent last.

        Raises KVLost (send the row again with the whole context), KVFull (open it again when there
        is room), KVNeverFits, LeaseLost, InternalError, Unavailable (the replica takes no
        generations), ReplicaLost (it was lost while the row was there, or is slow).
        """
        assert self._answer is not None, "a row was sent"
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._answer
        except TimeoutError:
            self._link.mark_unresponsive()
            raise ReplicaLost(f"the target has not answered for {timeout_s:g} s") from None
        try:
            reply = self._parse(result, proposal)
        except (InvalidRequest, ValueError) as error:
            self._link.breaker.failed(str(error))
            raise InternalError("the target's reply does not fit its row", str(error)) from error
        self._link.breaker.succeeded()
        return reply

    def close(self, *, keep: bool) -> None:
        """Ends the generation at the target; `keep` leaves its KV for the session's next turn."""
        self._link.detach(self._id)
        closing = target_pb2.TargetClose(generation_id=self._id, keep=keep)
        self._count(closing)
        self._link.send(closing)

    def answered(self, result: target_pb2.VerifyResult) -> None:
        self._count(result)
        if self._answer is not None and not self._answer.done():
            self.latency_s = time.monotonic() - self._sent_at
            if self.span is not None:
                self.span.round("verify", self._sent_at, gamma=self._gamma, replica=self.replica)
            self._answer.set_result(result)

    def failed(self, error: target_pb2.RowError) -> None:
        if self._failure is not None:  # of a row that was under way when the generation failed
            return
        failure: OutriderError
        if (kind := _ERRORS.get(error.reason)) is not None:
            failure = kind(f"the target: {error.detail}")
        elif error.detail == str(NonFiniteLogits()):
            failure = NonFiniteLogits()
        else:  # whatever an exception there has said
            failure = InternalError("the target replica failed in this generation", error.detail)
        if error.detail.startswith("sampling."):  # what this target does not serve, by its field
            failure = InvalidRequest(*error.detail.split(": ", 1))
        if isinstance(failure, InternalError):
            self._link.breaker.failed(error.detail)
        if not isinstance(failure, KVLost):  # the generation is closed there
            self._failure = failure
        self._fail(failure)

    def link_lost(self, why: str) -> None:
        message = "the target replica is lost, and no other took its place"
        self._failure = Unavailable(message, why)  # of a row that is not there yet
        self._fail(ReplicaLost(message, why))

    def _fail(self, failure: OutriderError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(failure)
            self._answer.exception()  # seen, should nobody wait for it any more

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
            told = result.support_probs or result.tail_mass or result.tail_logprobs
            if len(sample_ids) != gamma + 1 or told:
                raise ValueError("wrong lengths")
            reused = result.num_reused_tokens
            return VerifyResult(sample_ids, (), _NOTHING, _NOTHING, result.step_s, reused, left_out)
        supports = (proposal.supports if proposal is not None else None) or ()
        splits = np.cumsum([len(support.token_ids) for support in supports])[:-1]
        reply = VerifyResult(
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
        lengths = (len(reply.sample_ids), len(result.support_probs))
        tails = (len(reply.tail_mass), len(reply.tail_logprobs))
        if lengths != (num_rows, 4 * num_support) or (supports and tails != (gamma, gamma)):
            raise ValueError("wrong lengths")
        if self._num_logprobs is None:
            return reply
        top_ids = unpack(result.top_ids, UINT32, "top_ids").astype(np.int64)
        return replace(
            reply,
            support_logprobs=np.split(_floats(result.support_logprobs), splits),
            sample_logprobs=_floats(result.sample_logprobs),
            top_ids=top_ids.reshape(num_rows, -1),
            top_logprobs=_floats(result.top_logprobs).reshape(num_rows, -1),
        )


def _floats(data: bytes) -> Any:
    return unpack(data, FLOAT32, "target reply")


class TargetLink(ReplicaLink[Item, TargetHandle]):
    """All generations of this orchestrator at one target replica."""

    tier = "target"
    open_type = target_pb2.TargetOpen
    close_type = target_pb2.TargetClose

    def open(
        self, request: TargetRequest, *, kept_epoch: int, preempts: bool, age_s: float
    ) -> TargetHandle:
        """Open a generation; its first verify request may follow at once.

        `kept_epoch`: of the session's kept KV; 0: none is used. `preempts`: less urgent and later
        generations may lose their KV to it. `age_s`: since the request arrived. Raises Unavailable.
        """
        params = request.params
        handle = self.attach(lambda number: TargetHandle(self, number, params.logprobs))
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
                handle.answered(result)
        for error in frame.errors:
            if handle := self._handles.get(error.generation_id):
                handle.failed(error)
