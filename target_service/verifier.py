"""Worker of the target tier: sessions, waiting verify requests, one packed forward pass a step.

A step applies the new commands and packs every waiting request: all verifications, then prompts in
chunks within the token budget. It runs the model once and answers the complete requests. Every
method runs on the device thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from outrider.engine import Append, Sampler, ScoreRequest, ServedEngine
from outrider.engine.interface import BlockScores
from outrider.errors import InvalidRequest, KVLost, KVNeverFits, NonFiniteLogits
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

log = structlog.get_logger()


@dataclass(eq=False)
class _OpenGeneration:
    """The target's state of a generation; fields from `is_begun` on: of the waiting request."""

    key: GenerationKey
    sampler: Sampler
    preempts: bool = False
    committed_len: int = 0
    waiting: Verify | None = None
    # Whether KV was reserved for its first pass.
    is_begun: bool = False
    # Tokens found in the prefix cache.
    num_reused: int = 0
    step_s: float = 0.0
    # Set if draft tokens give NaN or infinite logits.
    search: DraftSearch | None = None

    @property
    def num_left_out(self) -> int:
        search = self.search
        return len(search.request.draft_token_ids) - search.num_good if search is not None else 0


@dataclass(frozen=True)
class _PlannedRequest:
    """The part of a verify request that is in the next pass; `is_last`: this part completes it."""

    live: LiveGeneration[_OpenGeneration]
    request: Verify
    append: Append
    is_last: bool

    @property
    def key(self) -> GenerationKey:
        return self.request.key

    @property
    def ask(self) -> ScoreRequest:
        return ScoreRequest(
            self.live.state.sampler,
            self.live.token_ids,
            self.request.committed_len,
            self.append.num_logits,
            self.request.supports,
        )


class Verifier(GenerationWorker[Command, Verified, _OpenGeneration, _PlannedRequest]):
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
            max_step_tokens=max_step_tokens,
            idle_session_ttl_s=idle_session_ttl_s,
            prefix_cache=prefix_cache,
        )
        self._max_gamma = max_gamma
        self._generations: dict[GenerationKey, LiveGeneration[_OpenGeneration]] = {}
        self._waiting: dict[GenerationKey, LiveGeneration[_OpenGeneration]] = {}
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
        self._generations[command.key] = self._opened(
            command.session_id,
            command.epoch,
            command.kept_epoch,
            command.max_len,
            (command.priority, time.monotonic() - command.age_s),
            _OpenGeneration(command.key, sampler, command.preempts),
        )

    def _enqueue(self, request: Verify) -> None:
        live = self._generations.get(request.key)
        if live is None:
            raise InvalidRequest("generation_id", f"{request.key.generation_id} is not open")
        state = live.state
        if state.waiting is not None:
            raise InvalidRequest("generation_id", "its previous request is not answered yet")
        request.check(len(live.token_ids), self._max_gamma, self._engine.info.vocab_size)
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

    def _gather(self) -> list[_PlannedRequest]:
        """Plans the next pass: every verification, then prompts in chunks.

        Prompts get at least a quarter of the token budget, so verifications cannot starve them.
        """
        plan: list[_PlannedRequest] = []
        prompts: list[LiveGeneration[_OpenGeneration]] = []
        budget = self._max_step_tokens
        for live in tuple(self._waiting.values()):
            if self._is_prompt(live):
                prompts.append(live)
            elif (planned := self._plan(live, budget)) is not None:
                plan.append(planned)
                budget -= len(planned.append.token_ids)
        budget = max(budget, self._max_step_tokens // 4, 1)
        for live in sorted(prompts, key=lambda live: live.urgency[0]):
            if budget <= 0:
                break
            if (planned := self._plan(live, budget)) is not None:
                plan.append(planned)
                budget -= len(planned.append.token_ids)
        # Later ones may have preempted some of these.
        return [planned for planned in plan if planned.key in self._waiting]

    def _is_prompt(self, live: LiveGeneration[_OpenGeneration]) -> bool:
        """Whether the request may run in chunks: it is longer than any verification."""
        return _num_tokens_left(live) > 1 + self._max_gamma

    def _plan(self, live: LiveGeneration[_OpenGeneration], budget: int) -> _PlannedRequest | None:
        """The request's part of the next pass; None if it has failed. `budget` is for prompts."""
        with self._failing_alone(live.state.key):
            if self._begin(live):  # after it little of a prompt may be left to run
                return _planned(live, budget if self._is_prompt(live) else _num_tokens_left(live))
        return None

    def _begin(self, live: LiveGeneration[_OpenGeneration]) -> bool:
        """Reserves KV for a new request; False if the generation has failed.

        Called right before the first pass, because earlier passes may still cache its prefix.
        """
        state = live.state
        if state.key not in self._waiting:  # preempted by a generation before it
            return False
        if state.is_begun:
            return True
        # Without KV, as at first or after the table had to drop it, the context is looked up.
        context_len = state.committed_len if not live.sequence.length else 0
        num_reused = self._reserve(
            live, _waiting(live).num_tokens, context_len=context_len, preempts=state.preempts
        )
        if num_reused is None:
            return False
        state.is_begun, state.num_reused = True, num_reused
        self._num_prefill_tokens += state.committed_len - 1 - live.sequence.length
        return True

    def _advance(self, work: Sequence[_PlannedRequest]) -> list[Verified | Failure]:
        appends = [planned.append for planned in work]
        complete = [planned for planned in work if planned.is_last]
        started_at = time.perf_counter()
        logits = self._engine.forward(appends)
        for planned in work:
            if len(planned.append.token_ids) > 1 + self._max_gamma:  # part of a prompt
                self._table.cache_prefix(planned.live, planned.live.state.committed_len)
        replies = self._engine.score([planned.ask for planned in complete], logits)
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
        return [self._outcome(planned, reply) for planned, reply in answered]

    def _outcome(
        self, planned: _PlannedRequest, reply: BlockScores | Exception
    ) -> Verified | Failure:
        """Completes a request. An error fails its generation only."""
        if isinstance(reply, Exception):
            return self._failed(planned.key, reply)
        state = planned.live.state
        result = Verified(planned.key, reply, state.step_s, state.num_reused, state.num_left_out)
        state.waiting, state.step_s = None, 0.0
        del self._waiting[planned.key]
        self._num_requests += 1
        return result

    def _is_run_again(self, planned: _PlannedRequest, reply: object) -> bool:
        """Whether the request runs again with fewer draft tokens, to find those that give NaN.

        Exact only if exactly the draft tokens up to the first bad one are verified, whatever the
        verification method (docs/concepts/exactness.md).
        """
        live, request, state = planned.live, planned.request, planned.live.state
        is_finite, num_drafts = not isinstance(reply, Exception), len(request.draft_token_ids)
        if not is_finite and not isinstance(reply, NonFiniteLogits):
            return False
        if state.search is None:
            if is_finite or not num_drafts:
                return False
            log.warning("drafts_left_out", session_id=live.session_id, why=str(reply))
            state.search = DraftSearch(request, num_drafts)
        if state.search.observe(num_drafts, is_finite=is_finite):
            return False
        self._table.forget_prefix(live)
        self._table.cut(live, request.keep_len)
        state.waiting, state.is_begun = state.search.next_request(), False
        return True


def _waiting(live: LiveGeneration[_OpenGeneration]) -> Verify:
    request = live.state.waiting
    assert request is not None, "a waiting generation has a request"
    return request


def _num_tokens_left(live: LiveGeneration[_OpenGeneration]) -> int:
    return _waiting(live).num_tokens - live.sequence.length


def _planned(live: LiveGeneration[_OpenGeneration], max_tokens: int) -> _PlannedRequest:
    """The request's next tokens, at most `max_tokens`; all of its logits come from one pass."""
    request, start, num_left = _waiting(live), live.sequence.length, _num_tokens_left(live)
    num_logits = 1 + len(request.draft_token_ids)
    is_last = num_left <= max_tokens
    num_tokens = num_left if is_last else min(max_tokens, num_left - num_logits)
    token_ids = live.token_ids[start : start + num_tokens]
    append = Append(live.sequence, token_ids, num_logits if is_last else 0)
    return _PlannedRequest(live, request, append, is_last)
