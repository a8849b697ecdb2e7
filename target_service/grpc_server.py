"""gRPC servicer of the target tier: converts frames to commands and events to frames."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np

from outrider.errors import InvalidRequest
from outrider.model_server.messages import FailureReason
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.servicer import ModelServicer, add_failure
from outrider.model_server.stream import StreamPeer
from outrider.runtime.protobuf import (
    FLOAT32,
    MAX_SUPPORT_IDS,
    UINT16,
    UINT32,
    pack,
    sampling_from_proto,
    session_id_from_proto,
    unpack,
)
from outrider.v1 import target_pb2, target_pb2_grpc
from target_service.messages import Command, Event, OpenTarget, Verified, Verify

_REASONS = {
    FailureReason.KV_LOST: target_pb2.RowError.REASON_KV_LOST,
    FailureReason.KV_FULL: target_pb2.RowError.REASON_KV_FULL,
    FailureReason.OUT_OF_MEMORY: target_pb2.RowError.REASON_KV_FULL,
    FailureReason.KV_NEVER: target_pb2.RowError.REASON_KV_NEVER,
    FailureReason.BAD_MESSAGE: target_pb2.RowError.REASON_BAD_ROW,
    FailureReason.DISPLACED: target_pb2.RowError.REASON_DISPLACED,
    FailureReason.INTERNAL: target_pb2.RowError.REASON_INTERNAL,
    FailureReason.NON_FINITE: target_pb2.RowError.REASON_INTERNAL,
    FailureReason.DRAINING: target_pb2.RowError.REASON_DRAINING,
}


class TargetServicer(ModelServicer[Command, Event], target_pb2_grpc.TargetServiceServicer):
    async def GetModelInfo(
        self,
        request: target_pb2.TargetServiceGetModelInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        load = target_pb2.TargetLoad(**asdict(self._statistics()))
        info = self._model_info(request)
        return target_pb2.TargetServiceGetModelInfoResponse(load=load, **info)

    async def Verify(
        self,
        request_iterator: AsyncIterator[target_pb2.VerifyRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        peer = _TargetPeer(next(self._peer_ids), self._model.max_gamma)
        await self._serve("verify", peer, request_iterator, context, _frame, _requests)


def _requests(frame: target_pb2.VerifyRequest) -> Iterator[tuple[target_pb2.VerifyRow, int]]:
    """All verify requests, with how many draft tokens each has."""
    for row in frame.rows:
        yield row, len(row.draft_token_ids) // UINT32.itemsize


class _TargetPeer(StreamPeer[Command, Event]):
    """Parses the frames of one orchestrator's stream. `max_gamma`: draft tokens per request."""

    def __init__(self, peer_id: int, max_gamma: int) -> None:
        super().__init__(peer_id)
        self._max_gamma = max_gamma

    def opening(self, key: GenerationKey, item: target_pb2.TargetOpen) -> OpenTarget:
        return OpenTarget(
            key=key,
            session_id=session_id_from_proto(item.session_id),
            epoch=item.epoch,
            kept_epoch=item.kept_epoch,
            prompt_len=item.prompt_len,
            max_len=item.max_len,
            params=sampling_from_proto(item.sampling, default_max_tokens=1, default_seed=0),
            priority=item.priority,
            preempts=item.preempts,
            age_s=item.age_ms / 1000,
        )

    def requests(self, frame: target_pb2.VerifyRequest) -> Iterable[target_pb2.VerifyRow]:
        return frame.rows

    def request(self, key: GenerationKey, item: target_pb2.VerifyRow) -> Verify:
        max_gamma = self._max_gamma
        drafts = unpack(item.draft_token_ids, UINT32, "draft_token_ids", max_gamma).astype(np.int64)
        context = unpack(item.context_token_ids, UINT32, "context_token_ids").astype(np.int64)
        supports = None
        if item.support_sizes or item.support_ids:
            sizes = unpack(item.support_sizes, UINT16, "support_sizes", max_gamma).astype(np.int64)
            if sizes.max(initial=0) > MAX_SUPPORT_IDS:
                raise InvalidRequest(
                    "support_sizes", f"{sizes.max()} ids of one position; at most {MAX_SUPPORT_IDS}"
                )
            ids = unpack(item.support_ids, UINT32, "support_ids").astype(np.int64)
            if len(sizes) != len(drafts) or sizes.sum() != len(ids):
                raise InvalidRequest(
                    "support_sizes", "must match draft_token_ids in number and support_ids in sum"
                )
            supports = np.split(ids, np.cumsum(sizes)[:-1])
        return Verify(
            key=key,
            keep_len=item.keep_len,
            context_token_ids=context,
            draft_token_ids=drafts,
            supports=supports,
            with_prompt_logprobs=item.with_prompt_logprobs,
        )


def _frame(events: Sequence[Event]) -> target_pb2.VerifyResponse:
    frame = target_pb2.VerifyResponse()
    for event in events:
        if isinstance(event, Verified):
            frame.results.append(_result(event))
        else:
            add_failure(frame, event, _REASONS)
    return frame


def _result(event: Verified) -> target_pb2.VerifyResult:
    reply = event.reply
    result = target_pb2.VerifyResult(
        generation_id=event.key.generation_id,
        support_probs=pack(reply.support_probs, FLOAT32),
        tail_mass=pack(reply.tail_mass, FLOAT32),
        tail_logprobs=pack(reply.tail_logprobs, FLOAT32),
        sample_ids=pack(reply.sample_ids, UINT32),
        step_s=event.step_s,
        num_reused_tokens=event.num_reused_tokens,
        num_left_out=event.num_left_out,
    )
    if reply.logprobs is not None:
        result.support_logprobs = pack(reply.logprobs.support, FLOAT32)
        result.sample_logprobs = pack(reply.logprobs.samples, FLOAT32)
        result.top_ids = pack(reply.logprobs.top_ids, UINT32)
        result.top_logprobs = pack(reply.logprobs.top, FLOAT32)
    if event.prompt is not None:
        result.prompt_logprobs = pack(event.prompt.logprobs, FLOAT32)
        result.prompt_top_ids = pack(event.prompt.top_ids, UINT32)
        result.prompt_top_logprobs = pack(event.prompt.top, FLOAT32)
        result.prompt_ranks = pack(event.prompt.ranks, UINT32)
    return result
