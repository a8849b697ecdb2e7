"""One `Generate` call from its lease to its last token: the round loop and, beside it, the emitter.

The rounds go: row out, verdict in, commit, tell the draft, next row; the emitter records each
commitment in Redis and then shows it to the caller, while the next round is under way. Lives in
the call's task; knows no protobuf and no tier's protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from orchestrator.blocks import Proposal, TargetReply
from orchestrator.conversation import Turn
from orchestrator.draft_link import DraftHandle, DraftLink
from orchestrator.patience import Patience
from orchestrator.request import GenerationRequest
from orchestrator.session import (
    Commitment,
    EmittedToken,
    Finish,
    GenerationState,
    SpeculationCounts,
)
from orchestrator.store import Counters, KvHandle, Lease, RoundRecord, SessionStore
from orchestrator.target_link import TargetHandle, TargetLink
from orchestrator.text import TextStream
from outrider.errors import KVLost, OutriderError, Unavailable
from outrider.tokenizer import Tokenizer

log = structlog.get_logger()

# Commitments that may wait for Redis and the caller before the rounds pause.
MAX_UNSEEN_COMMITMENTS = 64
# Must be well below the store's lease_ttl_s: long rounds renew the lease so often.
RENEW_INTERVAL_S = 3.0
# A draft replica that had no room is asked again after so long.
DRAFT_RETRY_S = 1.0


@dataclass(frozen=True)
class Timing:
    """How long a generation may wait for what."""

    verdict_timeout_s: float
    draft_wait_s: float | None


@dataclass(frozen=True)
class Tiers:
    """What a generation works with."""

    target: TargetLink
    draft: DraftLink | None
    store: SessionStore
    tokenizer: Tokenizer | None
    timing: Timing


@dataclass(frozen=True)
class Result:
    """Of the whole generation; times in seconds, bytes both ways."""

    finish: Finish
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    counts: SpeculationCounts
    time_to_first_token_s: float
    duration_s: float
    tokens_per_s: float | None
    draft_wire_bytes: int
    target_wire_bytes: int


@dataclass(frozen=True)
class Chunk:
    """Tokens that are in Redis; `result` in the last one."""

    tokens: tuple[EmittedToken, ...]
    text: str
    text_ends: tuple[int, ...]
    result: Result | None = None


class Generation:
    """`run` once. `write` gets every chunk, in order."""

    def __init__(
        self,
        tiers: Tiers,
        request: GenerationRequest,
        lease: Lease,
        turn: Turn,
        write: Callable[[Chunk], Awaitable[None]],
    ) -> None:
        self._tiers = tiers
        self._request = request
        self._lease = lease
        self._turn = turn
        self._write = write
        self._state = GenerationState(
            turn.token_ids,
            request.params,
            request.verification,
            tiers.target.model.eos_token_ids if tiers.target.model else (),
            TextStream(tiers.tokenizer, turn.token_ids, request.params.stop),
        )
        self._patience = Patience(request.gamma, tiers.timing.draft_wait_s)
        self._unseen: asyncio.Queue[tuple[Commitment, RoundRecord]] = asyncio.Queue(
            MAX_UNSEEN_COMMITMENTS
        )
        self._target: TargetHandle | None = None
        self._draft: DraftHandle | None = None
        self._draft_retry_at = 0.0
        self._draft_wire_bytes = 0
        self._cached_len = self._kept_len()
        self._num_reused = self._cached_len
        self._started_at = time.monotonic()
        self._first_token_at: float | None = None
        self._num_first_tokens = 0
        self._text = ""
        self._unrecorded: RoundRecord | None = None
        self._is_stopping = False

    def _kept_len(self) -> int:
        """How much of the context the target replica still holds from the turn before."""
        kept = self._lease.record.target_kv
        if kept is None or kept.replica != self._tiers.target.endpoint:
            return 0
        return min(kept.cached_len, self._turn.keep_len, len(self._turn.token_ids) - 1)

    async def run(self) -> None:
        """Raises what ended it early; whatever happens, both tiers and the lease are freed."""
        is_done = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._rounds(), name="rounds")
                tasks.create_task(self._emit(), name="emitter")
            is_done = True
        finally:
            await asyncio.shield(self._release(is_done))

    def stop(self) -> None:
        """Ends the output after the round under way; the server is stopping."""
        self._is_stopping = True

    async def _rounds(self) -> None:
        self._open_draft()  # the first token does not wait for it
        target = self._target = self._open_target()
        proposal: Proposal | None = None
        self._send_row(target, proposal)
        while True:
            sent_at = time.monotonic()
            reply = await self._reply(target, proposal)
            self._patience.saw_round(time.monotonic() - sent_at)
            commitment = self._commit(proposal, reply)
            record = self._record_of(commitment)
            if commitment.finish is not None:
                await self._unseen.put((commitment, record))
                return
            proposal = self._take_proposal()
            if proposal is not None:  # the next row leaves before anything else is done
                self._send_row(target, proposal)
                await self._unseen.put((commitment, record))
                continue
            await self._unseen.put((commitment, record))
            proposal = await self._wait_for_proposal()
            self._send_row(target, proposal)

    def _open_target(self) -> TargetHandle:
        params, kept = self._request.params, self._lease.record.target_kv
        return self._tiers.target.open(
            session_id=self._lease.session_id,
            epoch=self._lease.epoch,
            kept_epoch=kept.epoch if kept and self._cached_len else 0,
            prompt_len=self._state.prompt_len,
            max_len=self._state.prompt_len + params.max_tokens,
            params=params,
        )

    def _open_draft(self) -> None:
        """Opens the session at the draft, where there is one; again after it was lost."""
        link, request = self._tiers.draft, self._request
        if link is None or request.gamma == 0:
            return
        if self._draft is not None:
            if self._draft.lost is None or not self._draft.may_retry:
                return
            self._draft_wire_bytes += self._draft.wire_bytes
            self._draft.close(keep=False)
            self._draft = None
        if not link.is_connected or time.monotonic() < self._draft_retry_at:
            return
        self._draft_retry_at = time.monotonic() + DRAFT_RETRY_S
        assert self._tiers.target.model is not None, "the target is connected"
        self._draft = link.open(
            session_id=self._lease.session_id,
            epoch=self._lease.epoch,
            token_ids=self._state.token_ids,
            prompt_len=self._state.prompt_len,
            max_len=self._state.prompt_len + request.params.max_tokens,
            params=request.params,
            verification=request.verification,
            gamma=request.gamma,
            lookahead=request.lookahead,
            vocab_size=self._tiers.target.model.vocab_size,
        )

    def _send_row(self, target: TargetHandle, proposal: Proposal | None) -> None:
        target.send_row(self._cached_len, self._state.token_ids[self._cached_len :], proposal)

    async def _reply(self, target: TargetHandle, proposal: Proposal | None) -> TargetReply:
        try:
            return await target.reply(proposal, self._tiers.timing.verdict_timeout_s)
        except KVLost as error:
            log.info("kv_lost", session_id=self._lease.session_id, why=str(error))
            self._num_reused = self._cached_len = 0
            self._send_row(target, proposal)
            return await target.reply(proposal, self._tiers.timing.verdict_timeout_s)

    def _commit(self, proposal: Proposal | None, reply: TargetReply) -> Commitment:
        base_len = self._state.committed_len
        commitment = self._state.commit(proposal, reply)
        if commitment.finish is None and self._is_stopping:
            commitment = self._state.cancel(commitment)
        self._cached_len = base_len + commitment.num_accepted_tokens
        if proposal is not None:
            self._patience.saw_proposal(commitment.num_accepted_tokens)
        if self._draft is not None and self._draft.lost is None:
            is_last = commitment.finish is not None
            self._draft.commit(commitment.outcome, self._state.committed_len, is_last=is_last)
        return commitment

    def _take_proposal(self) -> Proposal | None:
        """The proposal for what is committed, if it was drafted ahead and is here."""
        room = self._state.max_draft_tokens
        proposal = self._draft.take() if self._draft is not None and room > 0 else None
        if proposal is None:
            return None
        self._state.counts.num_lookahead_hits += 1
        return proposal.head(room)

    async def _wait_for_proposal(self) -> Proposal | None:
        """Waits for the draft as long as that is worth more than going without."""
        room = self._state.max_draft_tokens
        if room <= 0:
            return None
        if self._draft is None or self._draft.lost is not None:
            self._open_draft()  # its first proposal is for a later round
            return None
        proposal = await self._draft.wait(self._patience.wait_s)
        if proposal is None:
            self._patience.saw_proposal(0)
            return None
        return proposal.head(room)

    def _record_of(self, commitment: Commitment) -> RoundRecord:
        return RoundRecord(
            token_ids=[token.token_id for token in commitment.tokens],
            counters=Counters(
                num_drafts=int(commitment.num_draft_tokens > 0),
                num_draft_tokens=commitment.num_draft_tokens,
                num_accepted_tokens=commitment.num_accepted_tokens,
                num_emitted_tokens=len(commitment.tokens),
            ),
            target_kv=self._target_kv(),
            draft_kv=self._draft_kv(),
        )

    def _target_kv(self) -> KvHandle | None:
        if self._target is None:
            return None
        return KvHandle(self._target.replica, self._lease.epoch, self._cached_len)

    def _draft_kv(self) -> KvHandle | None:
        if self._draft is None or self._draft.lost is not None:
            return None
        return KvHandle(self._draft.replica, self._lease.epoch, self._draft.cached_len)

    async def _emit(self) -> None:
        """Shows every commitment once Redis has it; what gathers meanwhile goes as one."""
        while True:
            batch = [await self._next_commitment()]
            while not self._unseen.empty():
                batch.append(self._unseen.get_nowait())
            for _, record in batch:
                self._unrecorded = self._unrecorded.then(record) if self._unrecorded else record
            await self._record()
            commitments = [commitment for commitment, _ in batch]
            if self._first_token_at is None:
                self._first_token_at = time.monotonic()
                self._num_first_tokens = sum(len(c.tokens) for c in commitments)
            finish = commitments[-1].finish
            chunk = _joined(commitments, self._result(finish) if finish else None)
            self._text += chunk.text
            await self._write(chunk)
            if finish:
                return

    async def _next_commitment(self) -> tuple[Commitment, RoundRecord]:
        while True:
            try:
                async with asyncio.timeout(RENEW_INTERVAL_S):
                    return await self._unseen.get()
            except TimeoutError:
                with contextlib.suppress(Unavailable):
                    await self._tiers.store.renew(self._lease)

    async def _record(self) -> None:
        """Without Redis the generation goes on; what is owed is written with the next round."""
        if self._unrecorded is None:
            return
        try:
            await self._tiers.store.record(self._lease, self._unrecorded)
            self._unrecorded = None
        except Unavailable as error:
            log.warning("not_recorded", session_id=self._lease.session_id, why=str(error))

    def _result(self, finish: Finish) -> Result:
        now = time.monotonic()
        assert self._target is not None, "a finished generation had a target"
        assert self._first_token_at is not None, "a finished generation has shown a token"
        num_later = self._state.num_output_tokens - self._num_first_tokens
        elapsed_s = now - self._first_token_at
        draft_bytes = self._draft_wire_bytes + (self._draft.wire_bytes if self._draft else 0)
        return Result(
            finish=finish,
            num_prompt_tokens=self._state.prompt_len,
            num_completion_tokens=self._state.num_output_tokens,
            num_cached_tokens=self._num_reused,
            counts=self._state.counts,
            time_to_first_token_s=self._first_token_at - self._started_at,
            duration_s=now - self._started_at,
            tokens_per_s=num_later / elapsed_s if num_later and elapsed_s > 0 else None,
            draft_wire_bytes=draft_bytes,
            target_wire_bytes=self._target.wire_bytes,
        )

    async def _release(self, is_done: bool) -> None:
        """Frees both tiers and the lease; a named session that ended well keeps its KV."""
        is_named = self._request.session_id is not None
        keep = is_done and is_named
        target_kv, draft_kv = (self._target_kv(), self._draft_kv()) if keep else (None, None)
        if self._target is not None:
            self._target.close(keep=keep)
        if self._draft is not None:
            self._draft.close(keep=keep)
        messages = self._turn.messages
        if messages:
            messages = (*messages, {"role": "assistant", "content": self._text})
        try:
            await self._record()
            await self._tiers.store.release(
                self._lease,
                target_kv=target_kv,
                draft_kv=draft_kv,
                messages=messages or None,
                delete=not is_named,
            )
        except OutriderError as error:  # the lease lapses by itself
            log.warning("not_released", session_id=self._lease.session_id, why=str(error))


def _joined(commitments: Sequence[Commitment], result: Result | None) -> Chunk:
    text, text_ends = "", []
    for commitment in commitments:
        text_ends += [len(text) + end for end in commitment.text_ends]
        text += commitment.text
    tokens = tuple(token for c in commitments for token in c.tokens)
    return Chunk(tokens, text, tuple(text_ends), result)
