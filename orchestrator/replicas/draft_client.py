"""The draft's client: outcomes out, proposals in. The only place here that knows draft.proto."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import structlog

from orchestrator.replicas.replica_stream import MODEL_INFO_TIMEOUT_S, ReplicaLink
from orchestrator.speculation.draft_source import DraftRequest
from orchestrator.speculation.verification import Proposal
from outrider.errors import InvalidRequest
from outrider.runtime.protobuf import (
    UINT32,
    costs_from_proto,
    pack,
    sampling_to_proto,
    unpack,
    unpack_supports,
    verification_to_proto,
)
from outrider.telemetry.tracing import current_span
from outrider.v1 import draft_pb2, draft_pb2_grpc, model_pb2

log = structlog.get_logger()

# A replica that was lost or had no room is asked again after so long.
RETRY_S = 1.0
# One that takes so many commits and proposes nothing for so long is given up, and asked again
# later. Long prompts may keep a draft busy for seconds before its first proposal.
MAX_UNANSWERED = 32
SILENT_AFTER_S = 20.0
SILENT_RETRY_S = 40.0
# From here on a hop costs more than the bytes that it takes to save it: 2 ms of rounds of some 30.
_LONG_ROUND_TRIP_S = 0.004
_NUM_ROUND_TRIPS = 4

Item = draft_pb2.DraftOpen | draft_pb2.DraftCommit | draft_pb2.DraftClose | str


class DraftHandle:
    """One generation at the draft. Used by its generation's task only.

    `context` is the generation's own list of committed tokens, which grows; it is only read here.
    """

    def __init__(
        self,
        link: DraftLink,
        generation_id: int,
        context: Sequence[int],
        max_gamma: int,
        vocab_size: int,
        *,
        has_supports: bool,
    ) -> None:
        self._link = link
        self._id = generation_id
        self._context = context
        self._max_gamma = max_gamma
        self._vocab_size = vocab_size
        self._has_supports = has_supports
        self._num_unanswered = 0
        self._heard_at = time.monotonic()
        self._proposals: list[Proposal] = []
        self._num_told = len(context)
        self._has_committed = False
        self._news = asyncio.Event()
        self.replica = link.endpoint
        self.lost: str | None = None
        # Whether, and after how long, the session may be opened at the replica again.
        self.retry_after_s: float | None = RETRY_S
        self.wire_bytes = 0
        # What its proposals have proved the replica to hold.
        self.cached_len = 0
        # Of the request, where it is traced.
        self.span = current_span()
        self._request_context = contextvars.copy_context()

    @property
    def num_behind(self) -> int:
        """Committed tokens that it has not been sent; of a handle just opened, all of them."""
        return len(self._context) - (self._num_told if self._has_committed else 0)

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        """Tells what was committed since; wants `gamma` draft tokens now, and blocks ahead.

        At most what the replica makes. Drops every proposal that assumed something else.
        """
        context = self._context
        gamma, ahead_gamma = min(gamma, self._max_gamma), min(ahead_gamma, self._max_gamma)
        self._proposals = [p for p in self._proposals if p.agrees(context)]
        if len(context) == self._num_told:
            return
        commit = draft_pb2.DraftCommit(
            generation_id=self._id,
            token_ids=pack(context[self._num_told :], UINT32),
            committed_len=len(context),
            gamma=gamma,
            ahead_gamma=ahead_gamma,
        )
        self._num_told, self._has_committed = len(context), True
        self._count(commit)
        self._link.send(commit)
        if gamma == 0 and ahead_gamma == 0:
            return
        self._num_unanswered += 1
        silent_s = time.monotonic() - self._heard_at
        if self._num_unanswered > MAX_UNANSWERED and silent_s > SILENT_AFTER_S:
            self.retry_after_s = SILENT_RETRY_S
            self.link_lost(f"no proposal for {self._num_unanswered} rounds and {silent_s:.0f} s")

    def proposal(self, least: int = 1) -> Proposal | None:
        """The longest that fits what is committed, of `least` tokens or all the replica makes."""
        here = [p for p in self._proposals if p.agrees(self._context)]
        rests = [rest for p in here if (rest := p.continuing(len(self._context))) is not None]
        best = max(rests, key=lambda rest: len(rest.token_ids), default=None)
        is_enough = best is not None and len(best.token_ids) >= min(least, self._max_gamma)
        return best if is_enough else None

    async def wait(self, timeout_s: float, least: int = 1) -> Proposal | None:
        """As `proposal`, waiting so long for it; None if it did not come or the draft is lost."""
        try:
            async with asyncio.timeout(timeout_s):
                while (proposal := self.proposal(least)) is None and self.lost is None:
                    self._news.clear()
                    await self._news.wait()
                return proposal
        except TimeoutError:
            return None

    def close(self, *, keep: bool) -> None:
        """Ends the generation at the draft; `keep` leaves its KV for the session's next turn."""
        self._link.detach(self._id)
        closing = draft_pb2.DraftClose(generation_id=self._id, keep=keep)
        self._count(closing)
        self._link.send(closing)

    def proposed(self, message: draft_pb2.Proposal) -> None:
        self._count(message)
        if self.lost is not None:
            return
        self._num_unanswered, self._heard_at = 0, time.monotonic()
        try:
            proposal = self._parse(message)
        except InvalidRequest as error:
            # A wrong draft costs speed, never an answer: nothing of it is used any more.
            self._log(log.warning, "bad_proposal", str(error))
            self._link.breaker.failed(str(error))
            self.retry_after_s = None
            self.link_lost(f"it sent a bad proposal: {error}")
            return
        self._link.breaker.succeeded()
        proven_len = proposal.base_len - len(proposal.assumed_token_ids)
        if proposal.agrees(self._context):
            proven_len = min(proposal.base_len, len(self._context) + 1)
            self._proposals.append(proposal)
            self._news.set()
        self.cached_len = max(self.cached_len, proven_len - 1)

    def _parse(self, message: draft_pb2.Proposal) -> Proposal:
        assumed = tuple(unpack(message.assumed_token_ids, UINT32, "assumed_token_ids").tolist())
        start = message.base_len - len(assumed)
        if not 0 < start <= len(self._context):
            raise InvalidRequest("base_len", f"{message.base_len} does not fit {len(assumed)} more")
        return _parse(message, assumed, self._max_gamma, self._vocab_size, self._has_supports)

    def failed(self, lost: draft_pb2.DraftLost) -> None:
        if lost.reason == draft_pb2.DraftLost.REASON_INTERNAL:
            self._link.breaker.failed(lost.detail)
        if lost.reason not in (
            draft_pb2.DraftLost.REASON_KV_FULL,
            draft_pb2.DraftLost.REASON_INTERNAL,
            draft_pb2.DraftLost.REASON_DRAINING,
        ):
            self.retry_after_s = None
        self._log(log.info, "draft_lost", lost.detail)
        self.link_lost(lost.detail)

    def _log(self, say: Callable[..., object], event: str, why: str) -> None:
        """With the ids of the request, though it is the link's task that has heard of it."""
        self._request_context.run(say, event, replica=self.replica, why=why)

    def link_lost(self, why: str) -> None:
        self.lost = why
        self._proposals.clear()
        self._news.set()

    def _count(self, item: Any) -> None:
        self.wire_bytes += item.ByteSize()


def _parse(
    message: draft_pb2.Proposal,
    assumed: tuple[int, ...],
    max_gamma: int,
    vocab_size: int,
    has_supports: bool,
) -> Proposal:
    """Raises InvalidRequest where the message contradicts itself or what was asked for."""
    token_ids = tuple(unpack(message.token_ids, UINT32, "token_ids").tolist())
    if not 1 <= len(token_ids) <= max_gamma:
        raise InvalidRequest("token_ids", f"{len(token_ids)} draft tokens; 1 to {max_gamma} may be")
    if max(token_ids) >= vocab_size:
        raise InvalidRequest("token_ids", f"{max(token_ids)} is not in [0, {vocab_size})")
    if has_supports != bool(message.support_sizes):
        raise InvalidRequest("support_sizes", "supports belong to sampled, uncoupled drafts only")
    supports = None
    if has_supports:
        supports = unpack_supports(
            message.support_sizes, message.support_ids, message.support_probs
        )
        if len(supports) != len(token_ids):
            raise InvalidRequest("support_sizes", f"{len(supports)} for {len(token_ids)} tokens")
        for token_id, support in zip(token_ids, supports, strict=True):
            if support.index_of(token_id) < 0:
                raise InvalidRequest("support_ids", f"token {token_id} is not in its own support")
            if support.token_ids.max() >= vocab_size:
                raise InvalidRequest("support_ids", f"must be in [0, {vocab_size})")
            if len(np.unique(support.token_ids)) != len(support.token_ids):
                raise InvalidRequest("support_ids", "a token stands twice in a support")
    return Proposal(message.base_len, token_ids, supports, assumed)


class DraftLink(ReplicaLink[Item, DraftHandle]):
    """All generations of this orchestrator at one draft replica."""

    tier = "draft"
    open_type = draft_pb2.DraftOpen
    close_type = draft_pb2.DraftClose
    _round_trip_s = 0.0

    def open(self, request: DraftRequest, gamma: int, lookahead: int) -> DraftHandle:
        """Open a generation; `gamma`: draft tokens wanted for its second round and later.

        Raises Unavailable.
        """
        assert self.model is not None, "it is connected"
        max_gamma = self.model.max_gamma
        params, verification = request.params, request.verification
        has_supports = params.needs_supports(verification)
        handle = self.attach(
            lambda number: DraftHandle(
                self,
                number,
                request.token_ids,
                max_gamma,
                request.vocab_size,
                has_supports=has_supports,
            )
        )
        opening = draft_pb2.DraftOpen(
            generation_id=handle._id,
            session_id=request.session_id,
            epoch=request.epoch,
            token_ids=pack(request.token_ids, UINT32),
            prompt_len=request.prompt_len,
            max_len=request.max_len,
            sampling=sampling_to_proto(params),
            verification=verification_to_proto(verification),
            # The prompt's round is under way without draft tokens.
            gamma=0,
            ahead_gamma=min(gamma, max_gamma),
            lookahead=lookahead,
            fan_out=request.fan_out,
            vocab_size=request.vocab_size,
            traceparent=handle.span.traceparent if handle.span is not None else "",
            tells_unlikely=self._round_trip_s >= _LONG_ROUND_TRIP_S,
        )
        handle._count(opening)
        self.send(opening)
        return handle

    async def _get_model(self, channel: grpc.aio.Channel) -> tuple[model_pb2.ModelInfo, int]:
        round_trips_s = []
        for _ in range(_NUM_ROUND_TRIPS):  # the first finds the connection
            asked_at = time.monotonic()
            found = await super()._get_model(channel)
            round_trips_s.append(time.monotonic() - asked_at)
        self._round_trip_s = min(round_trips_s)
        return found

    async def _ask_model(self, channel: grpc.aio.Channel, **fields: bool) -> Any:
        request = draft_pb2.DraftServiceGetModelInfoRequest(**fields)
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        return await stub.GetModelInfo(request, timeout=MODEL_INFO_TIMEOUT_S)

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        return draft_pb2_grpc.DraftServiceStub(channel).Propose()

    def _frame(self, items: list[Item]) -> draft_pb2.ProposeRequest:
        return draft_pb2.ProposeRequest(
            opens=[item for item in items if isinstance(item, draft_pb2.DraftOpen)],
            commits=[item for item in items if isinstance(item, draft_pb2.DraftCommit)],
            closes=[item for item in items if isinstance(item, draft_pb2.DraftClose)],
            forget_session_ids=[item for item in items if isinstance(item, str)],
        )

    def _dispatch(self, frame: draft_pb2.ProposeResponse) -> None:
        if frame.HasField("costs"):
            self.costs = costs_from_proto(frame.costs)
        for proposal in frame.proposals:
            if handle := self._handles.get(proposal.generation_id):
                handle.proposed(proposal)
        for error in frame.errors:
            if handle := self._handles.get(error.generation_id):
                handle.failed(error)
