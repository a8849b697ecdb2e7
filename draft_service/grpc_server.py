"""The draft's gRPC edge: frames to commands, events to frames. Knows no model and no batching."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np

from draft_service.messages import (
    Command,
    Commit,
    Event,
    OpenDraft,
    Proposed,
)
from outrider.model_server.messages import FailureReason, ServiceStatistics
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.scheduler import GenerationKey, Scheduler
from outrider.model_server.stream import StreamPeer, serve_stream
from outrider.model_server.stream_telemetry import ReplicaTelemetry
from outrider.replica import CostReport
from outrider.runtime.protobuf import (
    FLOAT32,
    UINT16,
    UINT32,
    costs_to_proto,
    model_answer,
    pack,
    sampling_from_proto,
    session_id_from_proto,
    state_to_proto,
    unpack,
    verification_from_proto,
)
from outrider.v1 import draft_pb2, draft_pb2_grpc, model_pb2

_REASONS = {
    FailureReason.KV_FULL: draft_pb2.DraftLost.REASON_KV_FULL,
    FailureReason.BAD_MESSAGE: draft_pb2.DraftLost.REASON_BAD_MESSAGE,
    FailureReason.DISPLACED: draft_pb2.DraftLost.REASON_DISPLACED,
    FailureReason.INTERNAL: draft_pb2.DraftLost.REASON_INTERNAL,
    FailureReason.NON_FINITE: draft_pb2.DraftLost.REASON_INTERNAL,
    FailureReason.DRAINING: draft_pb2.DraftLost.REASON_DRAINING,
}


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    """One per service; lives on the event loop."""

    def __init__(
        self,
        scheduler: Scheduler[Command, Event],
        model: model_pb2.ModelInfo,
        statistics: Callable[[], ServiceStatistics],
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
        request: draft_pb2.DraftServiceGetModelInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        load = draft_pb2.DraftLoad(**asdict(self._statistics()))
        return draft_pb2.DraftServiceGetModelInfoResponse(
            model=model_answer(self._model, with_token_hashes=request.with_token_hashes),
            load=load,
            costs=costs_to_proto(self._costs()),
            state=state_to_proto(self._status.state),
        )

    async def Propose(
        self,
        request_iterator: AsyncIterator[draft_pb2.ProposeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        peer = _Peer(next(self._peer_ids), self._model.max_context_len)
        await serve_stream(
            self._scheduler,
            peer,
            request_iterator,
            context,
            _frame,
            self._costs,
            self._status,
            self._watch.stream("draft", _asked),
        )


def _asked(frame: draft_pb2.ProposeRequest) -> Iterator[tuple[draft_pb2.DraftCommit, int]]:
    """For operators: commits whose proposal is waited for, with its number of draft tokens."""
    for commit in frame.commits:
        if commit.gamma:
            yield commit, commit.gamma


class _Peer(StreamPeer[Command, Event]):
    """Reads an orchestrator's frames. `max_context_len` in tokens."""

    def __init__(self, peer_id: int, max_context_len: int) -> None:
        super().__init__(peer_id)
        self._max_context_len = max_context_len

    def opening(self, key: GenerationKey, item: draft_pb2.DraftOpen) -> OpenDraft:
        return _open(key, item, self._max_context_len)

    def requests(self, frame: draft_pb2.ProposeRequest) -> Iterable[draft_pb2.DraftCommit]:
        return frame.commits

    def request(self, key: GenerationKey, item: draft_pb2.DraftCommit) -> Commit:
        return _commit(key, item, self._max_context_len)


def _open(key: GenerationKey, item: draft_pb2.DraftOpen, most: int) -> OpenDraft:
    return OpenDraft(
        key=key,
        session_id=session_id_from_proto(item.session_id),
        epoch=item.epoch,
        token_ids=unpack(item.token_ids, UINT32, "token_ids", most).astype(np.int64),
        prompt_len=item.prompt_len,
        max_len=item.max_len,
        params=sampling_from_proto(item.sampling, default_max_tokens=1, default_seed=0),
        verification=verification_from_proto(item.verification),
        gamma=item.gamma,
        ahead_gamma=item.ahead_gamma,
        lookahead=item.lookahead,
        fan_out=item.fan_out,
        vocab_size=item.vocab_size,
        tells_unlikely=item.tells_unlikely,
    )


def _commit(key: GenerationKey, item: draft_pb2.DraftCommit, most: int) -> Commit:
    return Commit(
        key=key,
        token_ids=unpack(item.token_ids, UINT32, "token_ids", most).tolist(),
        committed_len=item.committed_len,
        gamma=item.gamma,
        ahead_gamma=item.ahead_gamma,
    )


def _frame(events: Sequence[Event]) -> draft_pb2.ProposeResponse:
    frame = draft_pb2.ProposeResponse()
    for event in events:
        if isinstance(event, Proposed):
            frame.proposals.append(_proposal(event))
        else:
            frame.errors.add(
                generation_id=event.key.generation_id,
                reason=_REASONS[event.reason],
                detail=event.detail,
            )
    return frame


def _proposal(event: Proposed) -> draft_pb2.Proposal:
    message = draft_pb2.Proposal(
        generation_id=event.key.generation_id,
        assumed_token_ids=pack(event.assumed_token_ids, UINT32),
        base_len=event.base_len,
        token_ids=pack(event.token_ids, UINT32),
    )
    if event.supports is not None:
        message.support_sizes = pack([len(s.token_ids) for s in event.supports], UINT16)
        message.support_ids = pack(np.concatenate([s.token_ids for s in event.supports]), UINT32)
        message.support_probs = pack(np.concatenate([s.weights for s in event.supports]), FLOAT32)
    return message
