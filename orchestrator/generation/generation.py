"""One `Generate` call from its lease to its last token: the round loop.

Row out, verdict in, commit, tell the draft, next row; what is committed goes to the emitter, which
records and shows it while the next round is under way. Lives in the call's task; knows no protobuf
and no tier's protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from orchestrator.admission.place import Place
from orchestrator.generation.context import Tiers
from orchestrator.generation.drafting import Drafting
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.generation.recorder import MAX_CHUNK_TOKENS, Chunk, Emitter
from orchestrator.generation.result import Result
from orchestrator.generation.state import Commitment, Finish
from orchestrator.generation.verifying import Verifying
from orchestrator.replicas.draft_client import DraftHandle, DraftLink
from orchestrator.replicas.target_client import TargetHandle, TargetLink
from orchestrator.sessions import Counters, KvHandle, Lease, RoundRecord
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.verification import TargetReply
from outrider.errors import OutriderError


class Generation:
    """`run` once. `write` gets every chunk, in order; `asked_at` is when the call came in.

    `check_length` raises InvalidRequest where the request fits no target that there is now.

    """

    def __init__(
        self,
        tiers: Tiers,
        prepared: PreparedTurn,
        lease: Lease,
        place: Place,
        *,
        asked_at: float,
        write: Callable[[Chunk, Result | None], Awaitable[None]],
        check_length: Callable[[], None],
    ) -> None:
        assert tiers.targets.model is not None, "a target was connected"
        self._model = tiers.targets.model
        self._tiers = tiers
        self._request = request = prepared.request
        self._lease = lease
        self._turn = prepared.turn
        self._place = place
        self._write = write
        self._state = prepared.state
        self._policy = GammaPolicy(
            tiers.costs.pair(),
            request.max_gamma,
            fixed=request.gamma,
            fixed_wait_s=tiers.timing.draft_wait_s,
            waits_always=request.waits_for_draft,
        )
        self._may_draft = tiers.drafts is not None and request.max_gamma > 0 and request.gamma != 0
        self._drafting = Drafting(
            tiers.drafts if self._may_draft else None,
            self._open_draft,
            self._policy,
            lease.record.draft_kv,
        )
        self._verifying = Verifying(
            tiers.targets,
            self._open_target,
            check_length,
            self._state,
            self._kept(is_resumed=prepared.earlier is not None),
            place,
            verdict_timeout_s=tiers.timing.verdict_timeout_s,
            wait_s=tiers.timing.target_wait_s,
        )
        held_text, self._earlier = prepared.replayed
        self._emitter = Emitter(
            tiers.store,
            lease,
            prepared.turn,
            prepared.turn_json,
            self._show,
            is_durable=request.is_durable,
            is_begun=prepared.earlier is not None,
            held_text=held_text,
            num_unshown=prepared.num_unshown,
        )
        self._asked_at = asked_at
        self._is_stopping = False
        # Of the rounds after the prompt's.
        self._target_step_s = self._verify_s = 0.0

    def _kept(self, *, is_resumed: bool) -> KvHandle | None:
        """How much of the context some target replica still holds from the turn before.

        Of a turn that broke off it has let go, but for what its prefix cache has.
        """
        kept = self._lease.record.target_kv
        if kept is None:
            return None
        kept_len = min(kept.cached_len, self._turn.keep_len, len(self._turn.token_ids) - 1)
        return replace(kept, cached_len=0 if is_resumed else kept_len)

    async def run(self) -> None:
        """Raises what ended it early; whatever happens, both tiers and the lease are freed."""
        is_done = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._rounds(), name="rounds")
                tasks.create_task(self._emitter.run(), name="emitter")
            is_done = True
        finally:
            await self._tiers.endings.shielded(self._release(is_done))

    def stop(self) -> None:
        """Ends the output after the round under way; the server is stopping."""
        self._is_stopping = True

    async def _rounds(self) -> None:
        try:
            await self._run_rounds()
        except OutriderError:
            await self._emitter.drained()  # what is committed is recorded and shown all the same
            raise

    async def _run_rounds(self) -> None:
        if self._earlier is not None:
            for part in self._earlier.parts(MAX_CHUNK_TOKENS):
                await self._emitter.put(part, self._record_of(part, is_earlier=True))
            if self._earlier.finish is not None:
                return
        if self._state.max_draft_tokens > 0:
            self._drafting.open()  # the first token does not wait for it
        await self._verifying.open()
        self._verifying.send(None)
        while True:
            reply = await self._timed_reply()
            commitment = self._commit(reply)
            record = self._record_of(commitment)
            if commitment.finish is not None:
                await self._emitter.put(commitment, record)
                return
            proposal = self._drafting.next(self._state)
            if proposal is not None:  # the next row leaves before anything else is done
                self._verifying.send(proposal)
                await self._emitter.put(commitment, record)
                continue
            await self._emitter.put(commitment, record)
            proposal = await self._drafting.wait(self._state)
            self._verifying.send(proposal)

    def _open_target(self, link: TargetLink, kept_len: int, preempts: bool) -> TargetHandle:
        params, kept = self._request.params, self._lease.record.target_kv
        self._policy.costs.target_side = self._tiers.costs.target(link.endpoint)
        return link.open(
            session_id=self._lease.scoped_id,
            epoch=self._lease.epoch,
            kept_epoch=kept.epoch if kept and kept_len else 0,
            prompt_len=self._state.prompt_len,
            max_len=self._state.max_len,
            params=params,
            priority=self._place.priority,
            preempts=preempts,
            age_s=self._place.age_s,
        )

    def _open_draft(self, link: DraftLink, gamma: int) -> DraftHandle:
        request = self._request
        assert link.model is not None, "the draft is connected"
        self._policy.costs.draft_side = self._tiers.costs.draft(link.endpoint)
        return link.open(
            session_id=self._lease.scoped_id,
            epoch=self._lease.epoch,
            token_ids=self._state.token_ids,
            prompt_len=self._state.prompt_len,
            max_len=self._state.max_len,
            params=request.params,
            verification=request.verification,
            gamma=min(gamma, link.model.max_gamma),
            max_gamma=link.model.max_gamma,
            lookahead=self._policy.lookahead(request.lookahead),
            fan_out=request.fan_out,
            vocab_size=self._model.vocab_size,
        )

    async def _timed_reply(self) -> TargetReply:
        verifying = self._verifying
        reply = await verifying.reply()
        if self._state.counts.num_rounds:
            self._verify_s += verifying.latency_s
            self._target_step_s += reply.step_s
        # One that ran a prompt, the whole context at another replica included, says nothing.
        if verifying.num_context_sent == 1:
            self._policy.costs.saw_reply(
                verifying.latency_s, reply.step_s, left_at_once=not self._drafting.has_waited
            )
        return reply

    def _commit(self, reply: TargetReply) -> Commitment:
        base_len = self._state.committed_len
        commitment = self._state.commit(self._verifying.proposal, reply)
        if commitment.finish is None and self._is_stopping:
            commitment = self._state.cancel(commitment)
        num_held = min(commitment.num_accepted_tokens, reply.num_run)
        self._verifying.committed(base_len + num_held)
        self._policy.saw_round(
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
            draft_kv=self._drafting.kv(self._lease.epoch),
        )

    async def _show(self, chunk: Chunk) -> None:
        result = self._result(chunk.finish, chunk.recorded) if chunk.finish else None
        await self._write(chunk, result)

    def _result(self, finish: Finish, recorded: bool) -> Result:
        now = time.monotonic()
        first_at = self._emitter.first_chunk_at
        assert first_at is not None, "a finished generation has shown a token"
        num_later = self._emitter.num_shown_tokens - self._emitter.num_first_tokens
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
            draft_wire_bytes=self._drafting.wire_bytes,
            target_wire_bytes=self._verifying.wire_bytes,
            target_step_s=self._target_step_s,
            verify_s=self._verify_s,
            draft_wait_s=self._drafting.waited_s,
            decision=self._policy.decision if self._may_draft else None,
            num_interrupted_tokens=self._turn.num_interrupted_tokens,
        )

    async def _release(self, is_done: bool) -> None:
        """Frees both tiers and the lease; a named session that ended well keeps its KV."""
        is_named = self._request.session_id is not None
        keep = is_done and is_named
        target_kv, draft_kv = None, None
        if keep:
            epoch = self._lease.epoch
            target_kv, draft_kv = self._verifying.kv(epoch), self._drafting.kv(epoch)
        self._verifying.close(keep=keep)
        self._drafting.close(keep=keep)
        emitter = self._emitter
        if not await emitter.release(target_kv, draft_kv, is_named=is_named, is_done=is_done):
            self._tiers.endings.behind(emitter.go_on_releasing())  # the caller has all there is
