"""The device thread's half of the target: sessions, waiting rows, one packed forward a step.

A step applies what has come in, packs every row that waits (verification first, prompts in chunks
within the token budget), runs the model once and answers the rows that are complete. Knows nothing
of streams, protobuf or asyncio; every method is called on the device thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from outrider.engine import Append, Sampler, ScoreRequest, ServedEngine
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
class _TargetGeneration:
    key: GenerationKey
    sampler: Sampler
    preempts: bool = False
    # Of the context, by all rows so far.
    committed_len: int = 0
    waiting: Verify | None = None
    # The waiting row's: whether it has been in a pass, tokens found in the prefix cache, and the
    # time of the passes that it took part in.
    is_begun: bool = False
    num_reused: int = 0
    step_s: float = 0.0
    # Where the waiting row has draft tokens that give NaN or infinity.
    search: DraftSearch | None = None

    @property
    def num_left_out(self) -> int:
        search = self.search
        return len(search.row.draft_token_ids) - search.num_good if search is not None else 0


@dataclass(frozen=True)
class _PlannedRow:
    live: LiveGeneration[_TargetGeneration]
    row: Verify
    append: Append
    is_last: bool

    @property
    def key(self) -> GenerationKey:
        return self.row.key

    @property
    def ask(self) -> ScoreRequest:
        row = self.row
        return ScoreRequest(
            self.live.state.sampler,
            self.live.token_ids,
            row.keep_len + len(row.context_token_ids),
            self.append.num_logits,
            row.supports,
        )


class Verifier(GenerationWorker[Command, Verified, _TargetGeneration, _PlannedRow]):
    """Owns the engine's sequences. `max_gamma` and `max_step_tokens` as in TargetConfig."""

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
        self._generations: dict[GenerationKey, LiveGeneration[_TargetGeneration]] = {}
        self._waiting: dict[GenerationKey, LiveGeneration[_TargetGeneration]] = {}
        self._num_steps = self._num_rows = self._num_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def statistics(self) -> TargetStatistics:
        return TargetStatistics(
            **self._counts(),
            num_waiting_rows=len(self._waiting),
            num_steps_total=self._num_steps,
            num_rows_total=self._num_rows,
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
            raise InvalidRequest("generation_id", f"{command.key.generation_id} is open already")
        if not 1 <= command.prompt_len < command.max_len:
            raise InvalidRequest("max_len", f"{command.max_len} leaves no room after the prompt")
        if command.max_len > info.max_context_len:
            raise InvalidRequest("max_len", f"{command.max_len} exceeds the model's context")
        capacity = self._engine.store.capacity_tokens
        if command.max_len > capacity:
            raise KVNeverFits(
                f"max_len {command.max_len} exceeds the KV cache of {capacity} tokens"
            )
        command.params.validate(info.vocab_size)
        sampler = self._engine.sampler(command.params, command.prompt_len, info.vocab_size)
        self._generations[command.key] = self._opened(
            command.session_id,
            command.epoch,
            command.kept_epoch,
            command.max_len,
            (command.priority, time.monotonic() - command.age_s),
            _TargetGeneration(command.key, sampler, command.preempts),
        )

    def _enqueue(self, row: Verify) -> None:
        live = self._generations.get(row.key)
        if live is None:
            raise InvalidRequest("generation_id", f"{row.key.generation_id} is not open")
        if live.state.waiting is not None:
            raise InvalidRequest("generation_id", "its row before is not answered yet")
        row.check(len(live.token_ids), self._max_gamma, self._engine.info.vocab_size)
        if row.keep_len > live.sequence.length:
            raise KVLost(f"{live.sequence.length} tokens are held, not {row.keep_len}")
        self._table.cut(live, row.keep_len)
        live.token_ids[row.keep_len : row.num_tokens] = row.token_ids
        state = live.state
        state.waiting, state.is_begun, state.search = row, False, None
        state.committed_len = row.keep_len + len(row.context_token_ids)
        self._waiting[row.key] = live

    def _close(self, key: GenerationKey, *, keep: bool) -> None:
        self._waiting.pop(key, None)
        live = self._generations.pop(key, None)
        if live is not None:
            # KV of a row half done is a prefix like any other, so it may be kept.
            self._table.cache_prefix(live, live.state.committed_len)
            self._table.close(live, keep=keep)

    def _gather(self) -> list[_PlannedRow]:
        """Every verification, then prompts in chunks within what the token budget leaves.

        A quarter of the budget is the prompts' own, so that verifications never starve them.
        """
        plan: list[_PlannedRow] = []
        prompts: list[LiveGeneration[_TargetGeneration]] = []
        budget = self._max_step_tokens
        for live in tuple(self._waiting.values()):
            if self._is_prompt(live):
                prompts.append(live)
            elif self._begin(live):
                plan.append(_planned(live, _num_tokens_left(live)))
                budget -= len(plan[-1].append.token_ids)
        budget = max(budget, self._max_step_tokens // 4, 1)
        for live in sorted(prompts, key=lambda live: live.urgency[0]):
            if budget <= 0:
                break
            if self._begin(live):
                is_long = self._is_prompt(live)  # else the cache had nearly all of it
                plan.append(_planned(live, budget if is_long else _num_tokens_left(live)))
                budget -= len(plan[-1].append.token_ids)
        # Some may have lost their room to those that came after them.
        return [planned for planned in plan if planned.key in self._waiting]

    def _is_prompt(self, live: LiveGeneration[_TargetGeneration]) -> bool:
        """The row is longer than a verification can be; else it is run whole."""
        return _num_tokens_left(live) > 1 + self._max_gamma

    def _begin(self, live: LiveGeneration[_TargetGeneration]) -> bool:
        """Before the first pass of a row: room for it, or False where it has failed.

        Not sooner, for what the passes till then may cache.
        """
        state = live.state
        if state.key not in self._waiting:  # its room went to one before it
            return False
        if state.is_begun:
            return True
        row = _row_of(live)
        # The first row, and one for which others' pages had to be given up, start from nothing.
        context_len = state.committed_len if not live.sequence.length else 0
        num_reused = self._reserve(
            live, row.num_tokens, context_len=context_len, preempts=state.preempts
        )
        if num_reused is None:
            return False
        state.is_begun, state.num_reused = True, num_reused
        self._num_prefill_tokens += state.committed_len - 1 - live.sequence.length
        return True

    def _advance(self, work: Sequence[_PlannedRow]) -> list[Verified | Failure]:
        appends = [p.append for p in work]
        complete = [p for p in work if p.is_last]
        started_at = time.perf_counter()
        logits = self._engine.forward(appends)
        for planned in work:
            if len(planned.append.token_ids) > 1 + self._max_gamma:  # part of a prompt
                self._table.cache_prefix(planned.live, planned.live.state.committed_len)
        replies = self._engine.score([p.ask for p in complete], logits)
        step_s = time.perf_counter() - started_at
        self._observe(appends, step_s)
        self._num_steps += 1
        self._num_tokens += sum(len(append.token_ids) for append in appends)
        for planned in work:
            planned.live.state.step_s += step_s
        outcomes: list[Verified | Failure] = []
        settled = [
            (planned, reply)
            for planned, reply in zip(complete, replies, strict=True)
            if not self._is_run_again(planned, reply)
        ]
        self.health.observe([reply for _, reply in settled])
        for planned, reply in settled:
            if isinstance(reply, Exception):  # this row's own; the others are answered
                outcomes.append(self._failed(planned.key, reply))
                continue
            state = planned.live.state
            outcomes.append(
                Verified(planned.key, reply, state.step_s, state.num_reused, state.num_left_out)
            )
            state.waiting, state.step_s = None, 0.0
            del self._waiting[planned.key]
            self._num_rows += 1
        return outcomes

    def _is_run_again(self, planned: _PlannedRow, reply: object) -> bool:
        """Whether the row is run with fewer draft tokens: they may be what gives NaN or infinity.

        Exact for every verification only if the draft tokens up to the first bad one, and no
        others, are judged (docs/concepts/exactness.md).
        """
        live, row, state = planned.live, planned.row, planned.live.state
        is_finite, num_drafts = not isinstance(reply, Exception), len(row.draft_token_ids)
        if not is_finite and not isinstance(reply, NonFiniteLogits):
            return False
        if state.search is None:
            if is_finite or not num_drafts:
                return False
            log.warning("drafts_left_out", session_id=live.session_id, why=str(reply))
            state.search = DraftSearch(row, num_drafts)
        if state.search.observe(num_drafts, is_finite=is_finite):
            return False
        self._table.forget_prefix(live)
        self._table.cut(live, row.keep_len)
        state.waiting, state.is_begun = state.search.next_row(), False
        return True


def _row_of(live: LiveGeneration[_TargetGeneration]) -> Verify:
    row = live.state.waiting
    assert row is not None, "a waiting generation has a row"
    return row


def _num_tokens_left(live: LiveGeneration[_TargetGeneration]) -> int:
    return _row_of(live).num_tokens - live.sequence.length


def _planned(live: LiveGeneration[_TargetGeneration], max_tokens: int) -> _PlannedRow:
    """The row's next tokens, at most `max_tokens`; all its logits come from one pass."""
    row, start, num_left = _row_of(live), live.sequence.length, _num_tokens_left(live)
    num_logits = 1 + len(row.draft_token_ids)
    is_last = num_left <= max_tokens
    num_tokens = num_left if is_last else min(max_tokens, num_left - num_logits)
    token_ids = live.token_ids[start : start + num_tokens]
    append = Append(live.sequence, token_ids, num_logits if is_last else 0)
    return _PlannedRow(live, row, append, is_last)
