"""The target's gRPC edge: frames to commands, outcomes to frames. Knows no model, no batching."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np

from outrider.errors import InvalidRequest
from outrider.model_server.messages import FailureReason
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.scheduler import GenerationKey, Scheduler
from outrider.model_server.stream import StreamPeer, serve_stream
from outrider.model_server.stream_telemetry import ReplicaTelemetry
from outrider.replica import CostReport
from outrider.runtime.protobuf import (
    FLOAT32,
    MAX_SUPPORT_IDS,
    UINT16,
    UINT32,
    costs_to_proto,
    model_answer,
    pack,
    sampling_from_proto,
    session_id_from_proto,
    state_to_proto,
    unpack,
)
from outrider.v1 import model_pb2, target_pb2, target_pb2_grpc
from target_service.messages import (
    Command,
    OpenTarget,
    RowOutcome,
    TargetStatistics,
    Verified,
    Verify,
)

_REASONS = {
    FailureReason.KV_LOST: target_pb2.RowError.REASON_KV_LOST,
    FailureReason.KV_FULL: target_pb2.RowError.REASON_KV_FULL,
    FailureReason.KV_NEVER: target_pb2.RowError.REASON_KV_NEVER,
    FailureReason.BAD_MESSAGE: target_pb2.RowError.REASON_BAD_ROW,
    FailureReason.DISPLACED: target_pb2.RowError.REASON_DISPLACED,
    FailureReason.INTERNAL: target_pb2.RowError.REASON_INTERNAL,
    FailureReason.NON_FINITE: target_pb2.RowError.REASON_INTERNAL,
    FailureReason.DRAINING: target_pb2.RowError.REASON_DRAINING,
}


class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """One per service; lives on the event loop."""

    def __init__(
        self,
        scheduler: Scheduler[Command, RowOutcome],
        model: model_pb2.ModelInfo,
        statistics: Callable[[], TargetStatistics],
        costs: Callable[[], CostReport],
        status: ReplicaStatus,
        watch: ReplicaTelemetry,
    ) -> None:
        self._scheduler = scheduler
        self._model = model
        self._statistics = statistics
        self._costs = costs
        self._status = status
        self._watch = watch
        self._peer_ids = itertools.count(1)

    async def GetModelInfo(
        self,
        request: target_pb2.TargetServiceGetModelInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        load = target_pb2.TargetLoad(**asdict(self._statistics()))
        return target_pb2.TargetServiceGetModelInfoResponse(
            model=model_answer(self._model, with_token_hashes=request.with_token_hashes),
            load=load,
            costs=costs_to_proto(self._costs()),
            state=state_to_proto(self._status.state),
        )

    async def Verify(
        self,
        request_iterator: AsyncIterator[target_pb2.VerifyRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        peer = _Peer(next(self._peer_ids), self._model.max_gamma)
        await serve_stream(
            self._scheduler,
            peer,
            request_iterator,
            context,
            _frame,
            self._costs,
            self._status,
            self._watch.stream("verify", _asked),
        )


def _asked(frame: target_pb2.VerifyRequest) -> Iterator[tuple[target_pb2.VerifyRow, int]]:
    """For operators: every row, with its number of draft tokens."""
    for row in frame.rows:
        yield row, len(row.draft_token_ids) // UINT32.itemsize


class _Peer(StreamPeer[Command, RowOutcome]):
    """Reads an orchestrator's frames. `max_gamma`: draft tokens that a row may carry."""

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
        most = self._max_gamma
        drafts = unpack(item.draft_token_ids, UINT32, "draft_token_ids", most).astype(np.int64)
        context = unpack(item.context_token_ids, UINT32, "context_token_ids").astype(np.int64)
        supports = None
        if item.support_sizes or item.support_ids:
            sizes = unpack(item.support_sizes, UINT16, "support_sizes", most).astype(np.int64)
            if sizes.max(initial=0) > MAX_SUPPORT_IDS:
                raise InvalidRequest(
                    "support_sizes", f"{sizes.max()} ids of one position; at most {MAX_SUPPORT_IDS}"
                )
            ids = unpack(item.support_ids, UINT32, "support_ids").astype(np.int64)
            if len(sizes) != len(drafts) or sizes.sum() != len(ids):
                raise InvalidRequest("support_sizes", "do not fit draft_token_ids and support_ids")
            supports = np.split(ids, np.cumsum(sizes)[:-1])
        return Verify(
            key=key,
            keep_len=item.keep_len,
            context_token_ids=context,
            draft_token_ids=drafts,
            supports=supports,
        )


def _frame(outcomes: Sequence[RowOutcome]) -> target_pb2.VerifyResponse:
    frame = target_pb2.VerifyResponse()
    for outcome in outcomes:
        if isinstance(outcome, Verified):
            frame.results.append(_result(outcome))
        else:
            frame.errors.add(
                generation_id=outcome.key.generation_id,
                reason=_REASONS[outcome.reason],
                detail=outcome.detail,
            )
    return frame


def _result(outcome: Verified) -> target_pb2.VerifyResult:
    reply = outcome.reply
    result = target_pb2.VerifyResult(
        generation_id=outcome.key.generation_id,
        support_probs=pack(reply.support_probs, FLOAT32),
        tail_mass=pack(reply.tail_mass, FLOAT32),
        tail_logprobs=pack(reply.tail_logprobs, FLOAT32),
        sample_ids=pack(reply.sample_ids, UINT32),
        step_s=outcome.step_s,
        num_reused_tokens=outcome.num_reused_tokens,
        num_left_out=outcome.num_left_out,
    )
    if reply.logprobs is not None:
        result.support_logprobs = pack(reply.logprobs.support, FLOAT32)
        result.sample_logprobs = pack(reply.logprobs.samples, FLOAT32)
        result.top_ids = pack(reply.logprobs.top_ids, UINT32)
        result.top_logprobs = pack(reply.logprobs.top, FLOAT32)
    return result
