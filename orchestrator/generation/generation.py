"""One generation from its lease to its last token: the loop of rounds.

A round: send a verify request, await its result, commit, ask for the next proposal. Committed
tokens go to the recorder, which writes them to Redis and hands them on while the next round runs.
It runs in the task of its call.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from orchestrator.admission.ticket import AdmissionTicket
from orchestrator.generation.context import GenerationContext
from orchestrator.generation.output import Chunk, Result
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.generation.recorder import MAX_CHUNK_TOKENS, Recorder
from orchestrator.generation.state import Commitment, Finish
from orchestrator.generation.target_session import TargetSession
from orchestrator.replicas.target_client import TargetRequest
from orchestrator.replicas.tier_drafts import TierDrafts
from orchestrator.sessions import Counters, KvHandle, Lease, RoundRecord
from orchestrator.speculation.draft_source import DraftRequest, DraftSource, NoDrafts
from orchestrator.speculation.drafting import Drafting
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.verification import VerifyResult
from outrider.errors import OutriderError


class Generation:
    """Enter `running` once, and iterate over what it gives.

    `check_length` raises InvalidRequest where the request fits no target that is connected now.
    `asked_at`: when the request arrived (time.monotonic).
    """

    def __init__(
        self,
        tiers: GenerationContext,
        prepared: PreparedTurn,
        lease: Lease,
        place: AdmissionTicket,
        *,
        asked_at: float,
        check_length: Callable[[], None],
    ) -> None:
        self._tiers = tiers
        self._request = request = prepared.request
        self._lease = lease
        self._turn = prepared.turn
        self._state = prepared.state
        self._policy = GammaPolicy(
            tiers.costs.pair(),
            request.max_gamma,
            fixed=request.gamma,
            fixed_wait_s=tiers.timing.draft_wait_s,
            waits_always=request.waits_for_draft,
        )
        self._source = self._draft_source()
        self._drafting = Drafting(self._source, self._policy, tiers.costs, request.lookahead)
        self._verifying = TargetSession(
            tiers.targets,
            self._target_request(place.priority),
            self._state,
            self._kept(is_resumed=prepared.earlier is not None),
            place,
            check_length=check_length,
            verdict_timeout_s=tiers.timing.verdict_timeout_s,
            wait_s=tiers.timing.target_wait_s,
        )
        held_text, self._earlier = prepared.replayed
        self._recorder = Recorder(
            tiers.store,
            lease,
            prepared.turn,
            prepared.turn_json,
            is_durable=request.is_durable,
            is_begun=prepared.earlier is not None,
            held_text=held_text,
            num_unshown=prepared.num_unshown,
        )
        self._asked_at = asked_at
        self._is_stopping = False
        # Of the rounds after the prompt's.
        self._target_step_s = self._verify_s = 0.0

    @property
    def may_draft(self) -> bool:
        request = self._request
        return self._tiers.drafts is not None and request.max_gamma > 0 and request.gamma != 0

    def _draft_source(self) -> DraftSource:
        tiers, request, lease = self._tiers, self._request, self._lease
        if tiers.drafts is None or not self.may_draft:
            return NoDrafts()
        assert tiers.targets.model is not None, "a target was connected"
        asked = DraftRequest(
            session_id=lease.scoped_id,
            epoch=lease.epoch,
            token_ids=self._state.token_ids,
            prompt_len=self._state.prompt_len,
            max_len=self._state.max_len,
            params=request.params,
            verification=request.verification,
            fan_out=request.fan_out,
            vocab_size=tiers.targets.model.vocab_size,
        )
        kept = lease.record.draft_kv
        return TierDrafts(tiers.drafts, asked, kept.replica if kept is not None else None)

    def _target_request(self, priority: int) -> TargetRequest:
        return TargetRequest(
            session_id=self._lease.scoped_id,
            epoch=self._lease.epoch,
            prompt_len=self._state.prompt_len,
            max_len=self._state.max_len,
            params=self._request.params,
            priority=priority,
        )

    def _kept(self, *, is_resumed: bool) -> KvHandle | None:
        """How much of the context a target replica still holds from the turn before.

        A turn that broke off has released it; only the replica's prefix cache may hold it.
        """
        kept = self._lease.record.target_kv
        if kept is None:
            return None
        kept_len = min(kept.cached_len, self._turn.keep_len, len(self._turn.token_ids) - 1)
        return replace(kept, cached_len=0 if is_resumed else kept_len)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[AsyncIterator[Chunk]]:
        """Runs it for the time of a block, which iterates over its chunks to the last one.

        Raises what ended it early. However it ends, both tiers and the lease are released.
        """
        is_done = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._rounds(), name="rounds")
                tasks.create_task(self._recorder.run(), name="recorder")
                yield self
            is_done = True
        finally:
            await self._tiers.endings.shielded(self._release(is_done))

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk. Asking for it reports that the one before was sent."""
        chunk = await anext(self._recorder)
        if chunk.finish is None:
            return chunk
        return replace(chunk, result=self._result(chunk.finish, chunk.recorded))

    def stop(self) -> None:
        """Ends the output after the round under way; the server is stopping."""
        self._is_stopping = True

    async def _rounds(self) -> None:
        try:
            await self._run_rounds()
        except OutriderError:
            await self._recorder.drained()  # what is committed is recorded and sent all the same
            raise

    async def _run_rounds(self) -> None:
        recorder, drafting, verifying = self._recorder, self._drafting, self._verifying
        if self._earlier is not None:
            for part in self._earlier.parts(MAX_CHUNK_TOKENS):
                await recorder.put(part, self._record_of(part, is_earlier=True))
            if self._earlier.finish is not None:
                return
        if self._state.max_draft_tokens > 0:
            drafting.open()  # the first token does not wait for it
        await verifying.open()
        verifying.send(None)
        while True:
            reply = await self._timed_reply()
            commitment = self._commit(reply)
            record = self._record_of(commitment)
            if commitment.finish is not None:
                await recorder.put(commitment, record)
                return
            room = self._state.max_draft_tokens
            proposal = drafting.next(room)
            if proposal is not None:  # the next request leaves before anything else is done
                verifying.send(proposal)
                await recorder.put(commitment, record)
                continue
            await recorder.put(commitment, record)
            verifying.send(await drafting.wait(room))

    async def _timed_reply(self) -> VerifyResult:
        verifying, costs = self._verifying, self._policy.costs
        reply = await verifying.reply()
        costs.target_side = self._tiers.costs.target(verifying.replica)
        if self._state.counts.num_rounds:
            self._verify_s += verifying.latency_s
            self._target_step_s += reply.step_s
        # The time of a prompt, the whole context at another replica included, predicts nothing.
        if verifying.num_context_sent == 1:
            left_at_once = not self._drafting.has_waited
            costs.observe_result(verifying.latency_s, reply.step_s, left_at_once=left_at_once)
        return reply

    def _commit(self, reply: VerifyResult) -> Commitment:
        base_len = self._state.committed_len
        commitment = self._state.commit(self._verifying.proposal, reply)
        if commitment.finish is None and self._is_stopping:
            commitment = self._state.cancel(commitment)
        num_held = min(commitment.num_accepted_tokens, reply.num_run)
        self._verifying.committed(base_len + num_held)
        self._policy.observe_round(
            commitment.num_draft_tokens,
            commitment.num_accepted_tokens,
            is_rejected=commitment.is_rejected,
        )
        return commitment

    def _record_of(self, commitment: Commitment, *, is_earlier: bool = False) -> RoundRecord:
        """`is_earlier`: its tokens are in Redis already."""
        token_ids = [] if is_earlier else [token.token_id for token in commitment.tokens]
        return RoundRecord(
            token_ids=token_ids,
            counters=Counters(
                num_drafts=int(commitment.num_draft_tokens > 0),
                num_draft_tokens=commitment.num_draft_tokens,
                num_accepted_tokens=commitment.num_accepted_tokens,
                num_emitted_tokens=len(token_ids),
            ),
            target_kv=self._verifying.kv(self._lease.epoch),
            draft_kv=self._draft_kv(),
        )

    def _draft_kv(self) -> KvHandle | None:
        replica = self._source.replica
        if replica is None:
            return None
        return KvHandle(replica, self._lease.epoch, self._source.cached_len)

    def _result(self, finish: Finish, recorded: bool) -> Result:
        now = time.monotonic()
        first_at = self._recorder.first_chunk_at
        assert first_at is not None, "a finished generation has shown a token"
        num_later = self._recorder.num_shown_tokens - self._recorder.num_first_tokens
        elapsed_s = now - first_at
        return Result(
            finish=finish,
            recorded=recorded,
            num_prompt_tokens=self._state.prompt_len,
            num_completion_tokens=self._state.num_output_tokens,
            num_cached_tokens=self._verifying.num_reused,
            counts=self._state.counts,
            num_lookahead_hits=self._drafting.num_lookahead_hits,
            time_to_first_token_s=first_at - self._asked_at,
            duration_s=now - self._asked_at,
            tokens_per_s=num_later / elapsed_s if num_later and elapsed_s > 0 else None,
            draft_wire_bytes=self._source.wire_bytes,
            target_wire_bytes=self._verifying.wire_bytes,
            target_step_s=self._target_step_s,
            verify_s=self._verify_s,
            draft_wait_s=self._drafting.waited_s,
            decision=self._policy.decision if self.may_draft else None,
            num_interrupted_tokens=self._turn.num_interrupted_tokens,
        )

    async def _release(self, is_done: bool) -> None:
        """Frees both tiers and the lease; a named session that ended well keeps its KV."""
        is_named = self._request.session_id is not None
        keep = is_done and is_named
        target_kv, draft_kv = None, None
        if keep:
            epoch = self._lease.epoch
            target_kv, draft_kv = self._verifying.kv(epoch), self._draft_kv()
        self._verifying.close(keep=keep)
        self._drafting.close(keep=keep)
        recorder = self._recorder
        if not await recorder.release(target_kv, draft_kv, is_named=is_named, is_done=is_done):
            self._tiers.endings.behind(recorder.go_on_releasing())  # the caller has all there is
