"""Worker of the target tier: sessions, waiting verify requests, one packed forward pass a step.

A step applies the new commands and packs every waiting request: all verifications, then prompts in
chunks within the token budget. It runs the model once and answers the complete requests. Every
method runs on the device thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from outrider.engine import ServedEngine
from outrider.engine.interface import BlockScores
from outrider.errors import InvalidRequest, KVLost, KVNeverFits, NonFiniteLogits
from outrider.model_server.grammar_masks import MaskThread
from outrider.model_server.messages import Close, Failure, Forget
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import LiveGeneration
from outrider.model_server.step_costs import StepCosts
from outrider.model_server.worker import GenerationWorker
from target_service.messages import (
    Command,
    DraftSearch,
    Ids,
    OpenTarget,
    TargetStatistics,
    Verified,
    Verify,
)
from target_service.planned_request import (
    DeadEnd,
    OpenGeneration,
    PlannedRequest,
    Scoring,
    grammar_state,
    num_rows_of,
    num_tokens_left,
    planned_request,
    score_prompts,
    waiting_request,
)

log = structlog.get_logger()


class Verifier(GenerationWorker[Command, Verified, OpenGeneration, PlannedRequest]):
    """Verifies for all open generations; owns their KV. `TargetConfig` describes the settings."""

    def __init__(
        self,
        engine: ServedEngine,
        *,
        max_gamma: int,
        max_step_tokens: int,
        idle_session_ttl_s: float,
        prefix_cache: bool = True,
    ) -> None:
        super().__init__(
            engine,
            StepCosts(counts_rows=True),
            max_gamma=max_gamma,
            max_step_tokens=max_step_tokens,
            idle_session_ttl_s=idle_session_ttl_s,
            prefix_cache=prefix_cache,
        )
        self._max_gamma = max_gamma
        self._masks = MaskThread()
        self._generations: dict[GenerationKey, LiveGeneration[OpenGeneration]] = {}
        self._waiting: dict[GenerationKey, LiveGeneration[OpenGeneration]] = {}
        self._num_steps = self._num_requests = self._num_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def _keys_with_work(self) -> list[GenerationKey]:
        return list(self._waiting)

    def statistics(self) -> TargetStatistics:
        return TargetStatistics(
            **self._counts(),
            num_waiting_rows=len(self._waiting),
            num_steps_total=self._num_steps,
            num_rows_total=self._num_requests,
            num_tokens_total=self._num_tokens,
            num_preempted_total=self._num_preempted,
        )

    def _context_of(self, command: Command) -> Ids | None:
        if isinstance(command, Verify) and command.keep_len == 0:
            return command.context_token_ids
        return None

    def _execute(self, command: Command) -> Sequence[Failure]:
        match command:
            case OpenTarget():
                self._open(command)
            case Verify():
                self._enqueue(command)
            case Close():
                self._close(command.key, keep=command.keep)
            case Forget():
                self._table.forget(command.session_id)
        return ()

    def _open(self, command: OpenTarget) -> None:
        info = self._engine.info
        if command.key in self._generations:
            raise InvalidRequest("generation_id", f"{command.key.generation_id} is already open")
        command.check(info.max_context_len, info.vocab_size)
        capacity = self._engine.store.capacity_tokens
        if command.max_len > capacity:
            raise KVNeverFits(
                f"max_len {command.max_len} exceeds the KV cache of {capacity} tokens"
            )
        sampler = self._engine.sampler(command.params, command.prompt_len, info.vocab_size)
        grammar = grammar_state(command, self._engine)
        self._generations[command.key] = self._opened(
            command.session_id,
            command.epoch,
            command.kept_epoch,
            command.max_len,
            (command.priority, time.monotonic() - command.age_s),
            OpenGeneration(
                command.key, sampler, command.prompt_len, command.preempts, grammar=grammar
            ),
        )

    def _enqueue(self, request: Verify) -> None:
        live = self._generations.get(request.key)
        if live is None:
            raise InvalidRequest("generation_id", f"{request.key.generation_id} is not open")
        state = live.state
        if state.waiting is not None:
            raise InvalidRequest("generation_id", "its previous request is not answered yet")
        request.check(len(live.token_ids), self._max_gamma, self._engine.info.vocab_size)
        if request.with_prompt_logprobs and state.sampler.params.prompt_logprobs is None:
            raise InvalidRequest("with_prompt_logprobs", "the generation did not ask for them")
        if request.with_prompt_logprobs and request.committed_len < state.prompt_len:
            raise InvalidRequest("context_token_ids", f"shorter than prompt_len {state.prompt_len}")
        if request.keep_len > live.sequence.length:
            raise KVLost(f"keep_len {request.keep_len}: {live.sequence.length} tokens are cached")
        self._table.cut(live, request.keep_len)
        live.token_ids[request.keep_len : request.num_tokens] = request.token_ids
        state.waiting, state.is_begun, state.search = request, False, None
        state.committed_len = request.committed_len
        self._waiting[request.key] = live

    def _close(self, key: GenerationKey, *, keep: bool) -> None:
        self._waiting.pop(key, None)
        live = self._generations.pop(key, None)
        if live is not None:
            # The KV of an unfinished request is a valid prefix too, so it may be kept.
            self._table.cache_prefix(live, live.state.committed_len)
            self._table.close(live, keep=keep)

    def _gather(self) -> list[PlannedRequest]:
        """Plans the next pass: every verification, then prompts in chunks.

        Prompts get at least a quarter of the token budget, and rows for one block, so
        verifications cannot starve them. Verifications without rows left wait for the next pass,
        in the order in which they came.
        """
        plan: list[PlannedRequest] = []
        waiting = tuple(self._waiting.values())
        prompts = [live for live in waiting if self._is_prompt(live)]
        budget, block = self._limits.max_tokens, 1 + self._max_gamma
        num_rows = self._limits.max_rows - (block if prompts else 0)
        for live in waiting:
            if self._is_prompt(live) or num_rows < num_rows_of(live):
                continue
            if (planned := self._plan(live, budget, num_rows)) is not None:
                plan.append(planned)
                budget -= len(planned.append.token_ids)
                num_rows -= planned.append.num_logits
        num_rows += block if prompts else 0
        budget = max(budget, self._limits.max_tokens // 4, 1)
        for live in sorted(prompts, key=lambda live: live.urgency[0]):
            if budget <= 0 or num_rows < block:
                break
            if (planned := self._plan(live, budget, num_rows)) is not None:
                plan.append(planned)
                budget -= len(planned.append.token_ids)
                num_rows -= planned.append.num_logits
        # Later ones may have preempted some of these.
        return [planned for planned in plan if planned.key in self._waiting]

    def _is_prompt(self, live: LiveGeneration[OpenGeneration]) -> bool:
        """Whether the request may run in chunks: it is longer than any verification."""
        return num_tokens_left(live) > 1 + self._max_gamma

    def _plan(
        self, live: LiveGeneration[OpenGeneration], budget: int, max_rows: int
    ) -> PlannedRequest | None:
        """The request's part of the next pass; None if it has failed. Limits are for prompts."""
        with self._failing_alone(live.state.key):
            if self._begin(live):  # after it little of a prompt may be left to run
                max_tokens = budget if self._is_prompt(live) else num_tokens_left(live)
                return planned_request(live, max_tokens, max_rows)
        return None

    def _begin(self, live: LiveGeneration[OpenGeneration]) -> bool:
        """Reserves KV for a new request; False if the generation has failed.

        Called right before the first pass, because earlier passes may still cache its prefix.
        """
        state = live.state
        if state.key not in self._waiting:  # preempted by a generation before it
            return False
        if state.is_begun:
            return True
        # Without KV, as at first or after the table had to drop it, the context is looked up.
        request, state.prompt_scores = waiting_request(live), []
        is_looked_up = not live.sequence.length and not request.with_prompt_logprobs
        context_len = state.committed_len if is_looked_up else 0
        num_reused = self._reserve(
            live, request.num_tokens, context_len=context_len, preempts=state.preempts
        )
        if num_reused is None:
            return False
        state.is_begun, state.num_reused = True, num_reused
        self._num_prefill_tokens += state.committed_len - 1 - live.sequence.length
        return True

    def _advance(self, work: Sequence[PlannedRequest]) -> list[Verified | Failure]:
        work = sorted(work, key=lambda planned: planned.scores_prompt)  # their logits come last
        appends = [planned.append for planned in work]
        complete = [planned for planned in work if planned.is_last]
        started_at = time.perf_counter()
        scoring = Scoring(complete, self._masks)
        logits = self._engine.forward(appends)
        for planned in work:
            if len(planned.append.token_ids) > 1 + self._max_gamma:  # part of a prompt
                self._table.cache_prefix(planned.live, planned.live.state.committed_len)
        replies = scoring.replies(self._engine, logits)
        failed = score_prompts(work, self._engine, logits)
        step_s = time.perf_counter() - started_at
        self._observe(appends, step_s)
        self._num_steps += 1
        self._num_tokens += sum(len(append.token_ids) for append in appends)
        for planned in work:
            planned.live.state.step_s += step_s
        answered = [
            (planned, reply)
            for planned, reply in zip(complete, replies, strict=True)
            if not self._is_run_again(planned, reply)
        ]
        self.health.observe([reply for _, reply in answered])
        return [self._outcome(planned, reply) for planned, reply in (*answered, *failed)]

    def _outcome(
        self, planned: PlannedRequest, reply: BlockScores | Exception
    ) -> Verified | Failure:
        """Completes a request. An error fails its generation only."""
        if isinstance(reply, Exception):
            return self._failed(planned.key, reply)
        state = planned.live.state
        result = Verified(
            planned.key,
            reply,
            state.step_s,
            state.num_reused,
            state.num_left_out,
            state.scored_prompt,
        )
        state.waiting, state.step_s = None, 0.0
        del self._waiting[planned.key]
        self._num_requests += 1
        return result

    def _is_run_again(self, planned: PlannedRequest, reply: object) -> bool:
        """Whether the request runs again with fewer draft tokens.

        To find those that give NaN, or because the format allows no token after them.

        Exact only if exactly the draft tokens up to the first bad one are verified, whatever the
        verification method (docs/concepts/exactness.md).
        """
        live, request, state = planned.live, planned.request, planned.live.state
        is_finite, num_drafts = not isinstance(reply, Exception), len(request.draft_token_ids)
        if isinstance(reply, DeadEnd):
            whole = state.search.request if state.search is not None else request
            state.search = DraftSearch(whole, reply.num_live, reply.num_live - 1)
            return self._run_again(live, state.search)
        if not is_finite and not isinstance(reply, NonFiniteLogits):
            return False
        if state.search is None:
            if is_finite or not num_drafts:
                return False
            log.warning("drafts_left_out", session_id=live.session_id, why=str(reply))
            state.search = DraftSearch(request, num_drafts)
        if state.search.observe(num_drafts, is_finite=is_finite):
            return False
        return self._run_again(live, state.search)

    def _run_again(self, live: LiveGeneration[OpenGeneration], search: DraftSearch) -> bool:
        self._table.forget_prefix(live)
        self._table.cut(live, search.request.keep_len)
        live.state.waiting, live.state.is_begun = search.next_request(), False
        return True
