"""Loop of rounds of one generation, from its lease to its last token.

A round sends a verify request, awaits its result, commits tokens and takes the next proposal. The
recorder writes committed tokens to Redis and sends them while the next round runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from orchestrator.admission.ticket import AdmissionTicket
from orchestrator.generation.context import GenerationContext
from orchestrator.generation.draft_sources import DraftSources
from orchestrator.generation.observation import Observation, ObservedRound
from orchestrator.generation.output import Chunk, Result
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.generation.recorder import MAX_CHUNK_TOKENS, Recorder
from orchestrator.generation.state import Commitment, Finish
from orchestrator.generation.target_session import TargetSession
from orchestrator.replicas.target_client import TargetRequest
from orchestrator.sessions import Counters, KvHandle, Lease, RoundRecord
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.errors import OutriderError


class Generation:
    """One generation. Enter `running` once, in the request's task, and iterate over its chunks.

    `check_length` raises InvalidRequest if the request fits no connected target.
    `arrived_at`: when the request arrived (time.monotonic).
    """

    def __init__(
        self,
        context: GenerationContext,
        prepared: PreparedTurn,
        lease: Lease,
        ticket: AdmissionTicket,
        *,
        arrived_at: float,
        check_length: Callable[[], None],
    ) -> None:
        self._context = context
        self._request = request = prepared.request
        self._lease = lease
        self._turn = prepared.turn
        self._state = prepared.state
        self._state.planted_bias = context.planted_bias
        self._observation = Observation(context.observers(prepared, lease))
        sources = DraftSources(context, request, lease, prepared.state)
        self._may_draft = sources.may_draft
        self._pool_owner = sources.pool_owner
        self._source = sources.tier()
        self._policy = GammaPolicy(
            context.costs.pair(self._source.revision),
            request.max_gamma,
            fixed=request.gamma,
            fixed_wait_s=context.timeouts.draft_wait_s,
            waits_always=request.waits_for_draft,
            num_measured_rounds=self._source.num_measured_rounds,
        )
        self._format = sources.output_format(prepared.grammar)
        self._drafting = sources.router(self._source, self._policy, self._format)
        self._target = TargetSession(
            context.targets,
            self._target_request(ticket.priority),
            self._state,
            self._previous_kv(is_resumed=prepared.resumed is not None),
            ticket,
            check_length=check_length,
            verify_timeout_s=context.timeouts.verify_timeout_s,
            wait_s=context.timeouts.target_wait_s,
        )
        received_text, self._replayed = prepared.replayed
        self._recorder = Recorder(
            context.store,
            lease,
            prepared.turn,
            prepared.turn_json,
            is_durable=request.is_durable,
            is_resumed=prepared.resumed is not None,
            received_text=received_text,
            num_to_skip=prepared.num_unrecorded,
        )
        self._arrived_at = arrived_at
        self._is_stopping = False
        # Sums over the rounds after the prompt's.
        self._target_step_s = self._verify_s = 0.0

    def _target_request(self, priority: int) -> TargetRequest:
        params = self._request.params
        num_logprobs = self._observation.num_logprobs(params.logprobs)
        return TargetRequest(
            session_id=self._lease.scoped_id,
            epoch=self._lease.epoch,
            prompt_len=self._state.prompt_len,
            max_len=self._state.max_len,
            params=replace(params, logprobs=num_logprobs),
            priority=priority,
        )

    def _previous_kv(self, *, is_resumed: bool) -> KvHandle | None:
        """KV of the previous turn at a target replica, cut to the tokens that this turn shares.

        Its length is 0 for a resumed turn: an interrupted turn released its KV, and only the
        replica's prefix cache may still have it. Log-probabilities of the prompt need all of it.
        """
        previous = self._lease.record.target_kv
        if previous is None:
            return None
        cached_len = min(previous.cached_len, self._turn.keep_len, len(self._turn.token_ids) - 1)
        is_unused = is_resumed or self._request.params.prompt_logprobs is not None
        return replace(previous, cached_len=0 if is_unused else cached_len)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[AsyncIterator[Chunk]]:
        """Runs the generation while the block iterates over its chunks, to the last one.

        Raises the error that ended it early. Releases both tiers and the lease in any case.
        """
        is_done = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._rounds(), name="rounds")
                tasks.create_task(self._recorder.run(), name="recorder")
                yield self
            is_done = True
        finally:
            await self._context.cleanup.shielded(self._release(is_done))

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """Returns the next chunk. The call also reports that the previous chunk was sent."""
        chunk = await anext(self._recorder)
        if chunk.finish is None:
            return chunk
        return replace(chunk, result=self._result(chunk.finish, chunk.recorded))

    def stop(self) -> None:
        """Ends the output after the current round, because the server is stopping."""
        self._is_stopping = True

    async def _rounds(self) -> None:
        try:
            await self._run_rounds()
        except OutriderError:
            await self._recorder.drained()  # committed tokens are still recorded and sent
            raise

    async def _run_rounds(self) -> None:
        recorder, drafting, target = self._recorder, self._drafting, self._target
        if self._replayed is not None:
            for part in self._replayed.parts(MAX_CHUNK_TOKENS):
                await recorder.put(part, self._record_of(part, is_replayed=True))
            if self._replayed.finish is not None:
                return
        if self._state.max_draft_tokens > 0:
            drafting.open()  # the first token does not wait for it
        await target.open()
        target.send(None)
        while True:
            result = await self._timed_result()
            commitment = self._commit(result)
            record = self._record_of(commitment)
            if commitment.finish is not None:
                await recorder.put(commitment, record)
                return
            room = self._state.max_draft_tokens
            proposal = drafting.next(room)
            if proposal is not None:  # the next request is sent first of all
                target.send(self._cut(proposal))
                await recorder.put(commitment, record)
                continue
            await recorder.put(commitment, record)
            target.send(self._cut(await drafting.wait(room)))

    def _cut(self, proposal: Proposal | None) -> Proposal | None:
        """The proposal without tokens that the output's format makes useless."""
        if proposal is None or self._format is None:
            return proposal
        return self._format.cut(proposal)

    async def _timed_result(self) -> VerifyResult:
        target, costs = self._target, self._policy.costs
        result = await target.reply()
        costs.target = self._context.costs.target(target.replica)
        if self._state.counts.num_rounds:
            self._verify_s += target.latency_s
            self._target_step_s += result.step_s
        # The time of a prompt, or of the whole context after a move, does not predict a round's.
        if target.num_context_sent == 1:
            has_waited = self._drafting.has_waited
            costs.observe_result(target.latency_s, result.step_s, has_waited=has_waited)
        return result

    def _commit(self, result: VerifyResult) -> Commitment:
        base_len = self._state.committed_len
        proposal, replica = self._target.proposal, self._target.replica
        commitment = self._state.commit(proposal, result)
        if result.prompt_logprobs is not None:
            prompt_ids = self._state.token_ids[: self._state.prompt_len]
            scored = replace(result.prompt_logprobs, token_ids=prompt_ids)
            commitment = replace(commitment, prompt_logprobs=scored)
        outcome = self._state.outcome
        if self._format is not None:
            self._format.check()
        if self._observation.is_observed and outcome is not None:
            self._observation.observe(ObservedRound(base_len, proposal, result, outcome, replica))
        if commitment.finish is None and self._is_stopping:
            commitment = self._state.cancel(commitment)
        num_cached = min(commitment.num_accepted_tokens, result.num_run)
        self._target.committed(base_len + num_cached)
        self._drafting.observe_round(
            commitment.num_draft_tokens,
            commitment.num_accepted_tokens,
            is_rejected=commitment.is_rejected,
            source=commitment.source,
        )
        return commitment

    def _record_of(self, commitment: Commitment, *, is_replayed: bool = False) -> RoundRecord:
        """Record of a round for Redis. `is_replayed`: its tokens are there already."""
        token_ids = [] if is_replayed else [token.token_id for token in commitment.tokens]
        return RoundRecord(
            token_ids=token_ids,
            counters=Counters(
                num_drafts=int(commitment.num_draft_tokens > 0),
                num_draft_tokens=commitment.num_draft_tokens,
                num_accepted_tokens=commitment.num_accepted_tokens,
                num_emitted_tokens=len(token_ids),
            ),
            target_kv=self._target.kv(self._lease.epoch),
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
        assert first_at is not None, "a finished generation has sent a chunk"
        num_later = self._recorder.num_sent_tokens - self._recorder.num_first_tokens
        elapsed_s = now - first_at
        return Result(
            finish=finish,
            recorded=recorded,
            num_prompt_tokens=self._state.prompt_len,
            num_completion_tokens=self._state.num_output_tokens,
            num_cached_tokens=self._target.num_reused,
            counts=self._state.counts,
            num_lookahead_hits=self._drafting.num_lookahead_hits,
            time_to_first_token_s=first_at - self._arrived_at,
            duration_s=now - self._arrived_at,
            tokens_per_s=num_later / elapsed_s if num_later and elapsed_s > 0 else None,
            draft_wire_bytes=self._source.wire_bytes,
            target_wire_bytes=self._target.wire_bytes,
            target_step_s=self._target_step_s,
            verify_s=self._verify_s,
            draft_wait_s=self._drafting.waited_s,
            decision=self._policy.decision if self._may_draft else None,
            choices=self._drafting.choices,
            expected_tokens_per_s=self._drafting.expected,
            num_interrupted_tokens=self._turn.num_interrupted_tokens,
        )

    async def _release(self, is_done: bool) -> None:
        """Releases both tiers and the lease; a named session that ended well keeps its KV."""
        is_named = self._request.session_id is not None
        keep = is_done and is_named
        target_kv, draft_kv = None, None
        if keep:
            epoch = self._lease.epoch
            target_kv, draft_kv = self._target.kv(epoch), self._draft_kv()
        self._target.close(keep=keep)
        self._drafting.close(keep=keep)
        self._observation.ended(self._state)
        if is_done and (pool := self._context.past_outputs) is not None:
            pool.add(self._pool_owner, self._state.token_ids[self._state.prompt_len :])
        recorder = self._recorder
        if not await recorder.release(target_kv, draft_kv, is_named=is_named, is_done=is_done):
            self._context.cleanup.in_background(recorder.retry_release())
