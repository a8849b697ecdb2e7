"""Draft client: sends commits to a draft replica and receives its proposals.

Only this module and `proposal_message` use draft.proto here.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import grpc
import structlog

from orchestrator.replicas.pairing import PairedTarget
from orchestrator.replicas.proposal_message import proposal_from_proto
from orchestrator.replicas.replica_stream import MODEL_INFO_TIMEOUT_S, ModelCheck, ReplicaLink
from orchestrator.speculation.draft_source import DraftRequest
from orchestrator.speculation.verification import Proposal
from outrider.client.channel import OpenChannel, open_plain
from outrider.errors import InvalidRequest
from outrider.runtime.protobuf import (
    UINT32,
    costs_from_proto,
    pack,
    sampling_to_proto,
    verification_to_proto,
)
from outrider.telemetry.tracing import current_span
from outrider.v1 import draft_pb2, draft_pb2_grpc, model_pb2

log = structlog.get_logger()

# Delay before a replica that was lost or had no room is used again.
RETRY_S = 1.0
# A replica that proposes nothing for this many commits and this long is left, and used again later.
# Long prompts may keep a draft busy for seconds before its first proposal.
MAX_UNANSWERED = 32
UNRESPONSIVE_AFTER_S = 20.0
UNRESPONSIVE_RETRY_S = 40.0
# From this round trip on, replicas send unlikely proposals too: their bytes cost less than a hop
# of 2 ms in rounds of about 30 ms.
_LONG_ROUND_TRIP_S = 0.004
# Measurements of the round trip per connection; the shortest counts.
_NUM_ROUND_TRIPS = 4

# The replica has no room now, or takes no generations now.
_TEMPORARY = (draft_pb2.DraftLost.REASON_KV_FULL, draft_pb2.DraftLost.REASON_DRAINING)

Item = draft_pb2.DraftOpen | draft_pb2.DraftCommit | draft_pb2.DraftClose | str


class DraftHandle:
    """One generation at a draft replica. Used by the generation's task only.

    `context`: the generation's own list of committed tokens, which grows; only read here.
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
        self._last_proposal_at = time.monotonic()
        self._proposals: list[Proposal] = []
        # Committed tokens that the replica has been sent.
        self._num_sent = len(context)
        self._has_committed = False
        # Set when a proposal arrives, and when the replica is lost.
        self._changed = asyncio.Event()
        self.replica = link.endpoint
        # Why the replica makes no more proposals; None while it does.
        self.lost: str | None = None
        # Whether the loss may be due to this generation, not to a lack of room or to draining.
        self.has_failed = False
        # Delay before the session may be opened at the replica again; None: never.
        self.retry_after_s: float | None = RETRY_S
        self.wire_bytes = 0
        # Tokens that the replica must have processed, given its proposals.
        self.cached_len = 0
        # Span of the request; None if it is not traced.
        self.span = current_span()
        self._request_context = contextvars.copy_context()

    @property
    def num_behind(self) -> int:
        """Committed tokens that the replica has not been sent; all of them before a commit."""
        return len(self._context) - (self._num_sent if self._has_committed else 0)

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        """As DraftSource.commit. Caps both γ at the replica's maximum."""
        context = self._context
        gamma, ahead_gamma = min(gamma, self._max_gamma), min(ahead_gamma, self._max_gamma)
        self._proposals = [p for p in self._proposals if p.agrees(context)]
        if len(context) == self._num_sent:
            return
        commit = draft_pb2.DraftCommit(
            generation_id=self._id,
            token_ids=pack(context[self._num_sent :], UINT32),
            committed_len=len(context),
            gamma=gamma,
            ahead_gamma=ahead_gamma,
        )
        self._num_sent, self._has_committed = len(context), True
        self._count(commit)
        self._link.send(commit)
        if gamma == 0 and ahead_gamma == 0:
            return
        self._num_unanswered += 1
        idle_s = time.monotonic() - self._last_proposal_at
        if self._num_unanswered > MAX_UNANSWERED and idle_s > UNRESPONSIVE_AFTER_S:
            self.retry_after_s = UNRESPONSIVE_RETRY_S
            self.link_lost(f"no proposal for {self._num_unanswered} commits and {idle_s:.0f} s")

    @property
    def has_proposals(self) -> bool:
        """Whether a proposal continues the committed tokens, or may continue them later."""
        return any(proposal.agrees(self._context) for proposal in self._proposals)

    def proposal(self, min_tokens: int = 1) -> Proposal | None:
        """The longest proposal that continues the committed tokens, if it is long enough.

        Long enough: `min_tokens`, or the replica's maximum if that is less. A replica that was lost
        makes no more, so any length is.
        """
        fitting = [p for p in self._proposals if p.agrees(self._context)]
        rests = [rest for p in fitting if (rest := p.continuing(len(self._context))) is not None]
        best = max(rests, key=lambda rest: len(rest.token_ids), default=None)
        required = min(min_tokens, self._max_gamma) if self.lost is None else 1
        return best if best is not None and len(best.token_ids) >= required else None

    async def wait(self, timeout_s: float, min_tokens: int = 1) -> Proposal | None:
        """As `proposal`, but waits for it until the timeout or the loss of the replica."""
        try:
            async with asyncio.timeout(timeout_s):
                while (proposal := self.proposal(min_tokens)) is None and self.lost is None:
                    self._changed.clear()
                    await self._changed.wait()
                return proposal
        except TimeoutError:
            return None

    def close(self, *, keep: bool) -> None:
        """End the generation at the replica; `keep`: its KV stays for the session's next turn."""
        self._link.detach(self._id)
        closing = draft_pb2.DraftClose(generation_id=self._id, keep=keep)
        self._count(closing)
        self._link.send(closing)

    def received(self, message: draft_pb2.Proposal) -> None:
        """A proposal arrived. One that breaks the contract ends the use of this replica."""
        self._count(message)
        if self.lost is not None:
            return
        self._num_unanswered, self._last_proposal_at = 0, time.monotonic()
        try:
            proposal = proposal_from_proto(
                message, len(self._context), self._max_gamma, self._vocab_size, self._has_supports
            )
        except InvalidRequest as error:
            self._log(log.warning, "bad_proposal", str(error))
            self._link.breaker.failed(str(error))
            self.retry_after_s = None
            self._proposals.clear()  # its proposals cannot be trusted
            self.link_lost(f"the draft sent a bad proposal: {error}")
            return
        self._link.breaker.succeeded()
        processed_len = proposal.base_len - len(proposal.assumed_token_ids)
        if proposal.agrees(self._context):
            processed_len = min(proposal.base_len, len(self._context) + 1)
            self._proposals.append(proposal)
            self._changed.set()
        self.cached_len = max(self.cached_len, processed_len - 1)

    def failed(self, lost: draft_pb2.DraftLost) -> None:
        """The replica ended the generation."""
        if lost.reason == draft_pb2.DraftLost.REASON_INTERNAL:
            self._link.breaker.failed(lost.detail)
        if lost.reason not in (*_TEMPORARY, draft_pb2.DraftLost.REASON_INTERNAL):
            self.retry_after_s = None
        self._log(log.info, "draft_lost", lost.detail)
        self.link_lost(lost.detail)
        self.has_failed = lost.reason not in _TEMPORARY

    def _log(self, write: Callable[..., object], event: str, why: str) -> None:
        """Logs with the ids of the request, although the link's task calls this."""
        self._request_context.run(write, event, replica=self.replica, why=why)

    def link_lost(self, why: str) -> None:
        """No more proposals come. Those that have arrived can still be used."""
        self.lost = why
        self.has_failed = True
        self._changed.set()

    def _count(self, item: Any) -> None:
        self.wire_bytes += item.ByteSize()


class DraftLink(ReplicaLink[Item, DraftHandle]):
    """Link to one draft replica, shared by all generations of this orchestrator."""

    tier = "draft"
    open_type = draft_pb2.DraftOpen
    close_type = draft_pb2.DraftClose
    _round_trip_s = 0.0
    # Whether the stream's first frame, which names the target, is still to be sent.
    _is_first_frame = False

    def __init__(
        self,
        endpoint: str,
        check_model: ModelCheck,
        on_change: Callable[[], None],
        open_channel: OpenChannel = open_plain,
        find_target: Callable[[model_pb2.ModelInfo], PairedTarget | None] = lambda _: None,
    ) -> None:
        """As ReplicaLink. `find_target`: the target, for this replica's model; None: not known."""
        super().__init__(endpoint, check_model, on_change, open_channel)
        self._find_target = find_target

    def open(self, request: DraftRequest, gamma: int, lookahead: int) -> DraftHandle:
        """Open a generation. `gamma`: draft tokens per round from its second round on.

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
            # The first round verifies the prompt, without draft tokens.
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
        for _ in range(_NUM_ROUND_TRIPS):  # the first one includes connecting
            started_at = time.monotonic()
            found = await super()._get_model(channel)
            round_trips_s.append(time.monotonic() - started_at)
        self._round_trip_s = min(round_trips_s)
        return found

    async def _ask_model(self, channel: grpc.aio.Channel, **fields: bool) -> Any:
        request = draft_pb2.DraftServiceGetModelInfoRequest(**fields)
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        return await stub.GetModelInfo(request, timeout=MODEL_INFO_TIMEOUT_S)

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        self._is_first_frame = True
        return draft_pb2_grpc.DraftServiceStub(channel).Propose()

    def _frame(self, items: list[Item]) -> draft_pb2.ProposeRequest:
        target = None
        if self._is_first_frame and self.model is not None:
            target, self._is_first_frame = self._find_target(self.model), False
        return draft_pb2.ProposeRequest(
            target=None if target is None else draft_pb2.DraftTarget(**asdict(target)),
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
                handle.received(proposal)
        for error in frame.errors:
            if handle := self._handles.get(error.generation_id):
                handle.failed(error)
