"""gRPC servicer of the draft tier: converts frames to commands and events to frames."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np

from draft_service.messages import Command, Commit, Event, OpenDraft, Proposed, TargetIdentity
from outrider.errors import InvalidRequest
from outrider.model_server.messages import FailureReason
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.servicer import ModelServicer, add_failure
from outrider.model_server.stream import StreamPeer
from outrider.runtime.protobuf import (
    FLOAT32,
    UINT16,
    UINT32,
    pack,
    sampling_from_proto,
    session_id_from_proto,
    unpack,
    unpack_ranges,
    verification_from_proto,
)
from outrider.v1 import draft_pb2, draft_pb2_grpc

_REASONS = {
    FailureReason.KV_FULL: draft_pb2.DraftLost.REASON_KV_FULL,
    FailureReason.OUT_OF_MEMORY: draft_pb2.DraftLost.REASON_KV_FULL,
    FailureReason.BAD_MESSAGE: draft_pb2.DraftLost.REASON_BAD_MESSAGE,
    FailureReason.DISPLACED: draft_pb2.DraftLost.REASON_DISPLACED,
    FailureReason.INTERNAL: draft_pb2.DraftLost.REASON_INTERNAL,
    FailureReason.NON_FINITE: draft_pb2.DraftLost.REASON_INTERNAL,
    FailureReason.DRAINING: draft_pb2.DraftLost.REASON_DRAINING,
}

# Ranges of token ids that draft and target do not share.
_MAX_RANGES = 65_536
# Characters of a target's name or fingerprint, and those of the fingerprint in session keys.
_MAX_NAME_CHARS = 1024
_SHORT = 12


class DraftServicer(ModelServicer[Command, Event], draft_pb2_grpc.DraftServiceServicer):
    async def GetModelInfo(
        self,
        request: draft_pb2.DraftServiceGetModelInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        load = draft_pb2.DraftLoad(**asdict(self._statistics()))
        info = self._model_info(request)
        return draft_pb2.DraftServiceGetModelInfoResponse(load=load, **info)

    async def Propose(
        self,
        request_iterator: AsyncIterator[draft_pb2.ProposeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        peer = _DraftPeer(next(self._peer_ids), self._model.max_context_len)
        await self._serve("draft", peer, request_iterator, context, _frame, _requests)


def _requests(frame: draft_pb2.ProposeRequest) -> Iterator[tuple[draft_pb2.DraftCommit, int]]:
    """Commits that ask for draft tokens, with how many."""
    for commit in frame.commits:
        if commit.gamma:
            yield commit, commit.gamma


class _DraftPeer(StreamPeer[Command, Event]):
    """Parses the frames of one orchestrator's stream. `max_context_len` in tokens."""

    def __init__(self, peer_id: int, max_context_len: int) -> None:
        super().__init__(peer_id)
        self._max_context_len = max_context_len
        self._target = TargetIdentity()

    def commands(self, frame: draft_pb2.ProposeRequest) -> list[Command]:
        if frame.HasField("target"):
            self._target = _target(frame.target)
        return super().commands(frame)

    def session_key(self, session_id: str) -> str:
        """Sessions of two targets may have the same id."""
        return f"{self._target.model_fingerprint[:_SHORT]}:{session_id}"

    def opening(self, key: GenerationKey, item: draft_pb2.DraftOpen) -> OpenDraft:
        session_id = self.session_key(session_id_from_proto(item.session_id))
        return _open(key, item, session_id, self._target, self._max_context_len)

    def requests(self, frame: draft_pb2.ProposeRequest) -> Iterable[draft_pb2.DraftCommit]:
        return frame.commits

    def request(self, key: GenerationKey, item: draft_pb2.DraftCommit) -> Commit:
        return _commit(key, item, self._max_context_len)


def _target(message: draft_pb2.DraftTarget) -> TargetIdentity:
    for name, text in (
        ("target.name", message.name),
        ("target.model_fingerprint", message.model_fingerprint),
        ("target.tokenizer_fingerprint", message.tokenizer_fingerprint),
    ):
        if len(text) > _MAX_NAME_CHARS:
            raise InvalidRequest(name, f"{len(text)} characters; at most {_MAX_NAME_CHARS}")
    unpack_ranges(message.unshared_ids, "target.unshared_ids", _MAX_RANGES)
    return TargetIdentity(
        message.name,
        message.model_fingerprint,
        message.unshared_ids,
        message.tokenizer_fingerprint,
    )


def _open(
    key: GenerationKey,
    item: draft_pb2.DraftOpen,
    session_id: str,
    target: TargetIdentity,
    max_tokens: int,
) -> OpenDraft:
    return OpenDraft(
        key=key,
        session_id=session_id,
        epoch=item.epoch,
        token_ids=unpack(item.token_ids, UINT32, "token_ids", max_tokens).astype(np.int64),
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
        target=target,
    )


def _commit(key: GenerationKey, item: draft_pb2.DraftCommit, max_tokens: int) -> Commit:
    return Commit(
        key=key,
        token_ids=unpack(item.token_ids, UINT32, "token_ids", max_tokens).tolist(),
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
            add_failure(frame, event, _REASONS)
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
