"""Worker of the draft tier: sessions, speculation trees, one batched forward pass for all of them.

A step applies the new commands first, so outdated drafting stops within one step. It then samples
one token per row: first for the blocks that orchestrators wait for, then for the most likely blocks
drafted ahead of a verify result, within the row budget (`tree.row_budget`) and in the order of
`work_queues`. Targets share rows, tokens and KV pages fairly.
Every method runs on the device thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from draft_service.fair_kv import FairKVWorker
from draft_service.messages import (
    Command,
    Commit,
    DraftStatistics,
    Ids,
    OpenDraft,
    Proposed,
    SupportWeights,
)
from draft_service.opening import Openings
from draft_service.reencoding import Reencoder
from draft_service.tree.block import DraftBlock
from draft_service.tree.draft_session import (
    DraftGeneration,
    DraftRow,
    DraftSession,
    RowMasks,
    sample_rows,
)
from draft_service.tree.row_budget import RowBudget
from draft_service.work_queues import WorkQueues
from outrider.engine import Append, SampledToken, ServedEngine
from outrider.engine import Sequence as KVSequence
from outrider.errors import InvalidRequest
from outrider.model_server.grammar_masks import MaskThread
from outrider.model_server.messages import Close, Failure, Forget
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import LiveGeneration
from outrider.model_server.step_costs import StepCosts

# A row with more pending tokens than this is a prompt: it is processed in chunks.
_MAX_ROW_TOKENS = 16


class Proposer(FairKVWorker):
    """Drafts for all open generations; owns their KV. `DraftConfig` describes the settings."""

    def __init__(
        self,
        engine: ServedEngine,
        *,
        max_gamma: int,
        max_step_tokens: int,
        max_branches: int,
        idle_session_ttl_s: float,
        prefix_cache: bool = True,
        reencoders: Mapping[str, Reencoder] | None = None,
    ) -> None:
        """`reencoders`: for targets with another tokenizer, by its fingerprint."""
        super().__init__(
            engine,
            StepCosts(),
            max_gamma=max_gamma,
            max_step_tokens=max_step_tokens,
            idle_session_ttl_s=idle_session_ttl_s,
            prefix_cache=prefix_cache,
        )
        self._max_gamma = max_gamma
        self._openings = Openings(engine, reencoders or {}, max_gamma)
        self._masks = MaskThread()
        self._queues = WorkQueues(max_step_tokens)
        self._budget = RowBudget(self.costs, max_branches)

    @property
    def has_work(self) -> bool:
        return bool(self._queues)

    def _keys_with_work(self) -> list[GenerationKey]:
        return self._queues.keys()

    def statistics(self) -> DraftStatistics:
        return DraftStatistics(
            **self._counts(),
            num_waiting_generations=self._queues.num_needed,
            targets=self._targets.statistics(),
        )

    def _context_of(self, command: Command) -> Ids | None:
        if isinstance(command, OpenDraft) and not command.target.tokenizer_fingerprint:
            return command.token_ids
        return None

    def _execute(self, command: Command) -> Sequence[Proposed | Failure]:
        match command:
            case OpenDraft():
                self._open(command)
            case Commit():
                return self._commit(command)
            case Close():
                self._close(command.key, keep=command.keep)
            case Forget():
                self._table.forget(command.session_id)
        return ()

    def _open(self, command: OpenDraft) -> None:
        if command.key in self._drafting:
            raise InvalidRequest("generation_id", f"{command.key.generation_id} is already open")
        target = self._targets.get(command.target)
        opening = self._openings.opening(command, target)
        token_ids, committed_len = opening.token_ids, len(opening.token_ids)
        generation = DraftGeneration(
            command.key,
            opening.sampler,
            command.verification,
            command.vocab_size,
            target,
            command.prompt_len,
            opening.grammar,
        )
        started = (0, time.monotonic())
        live = self._opened(
            command.session_id, command.epoch, None, opening.max_len, started, generation
        )
        num_same = _common_prefix_len(live.token_ids[: live.sequence.length], token_ids)
        # The last token is run again: the next token is sampled from its logits.
        self._table.cut(live, min(num_same, committed_len - 1))
        live.token_ids[:committed_len] = token_ids
        drafting = DraftSession(self._engine.store, live, command, opening.text)
        self._drafting[command.key] = drafting
        target.num_open += 1
        self._queues.update(drafting)

    def _sequences_of(self, live: LiveGeneration[DraftGeneration]) -> Collection[KVSequence]:
        return (live.sequence, *self._drafting[live.state.key].branch_sequences)

    def _commit(self, command: Commit) -> list[Proposed]:
        """Applies a commit; returns blocks that it asks for and that are already drafted.

        Such a block was too unlikely to be sent before, or the commit asks for fewer tokens.
        """
        drafting = self._drafting.get(command.key)
        if drafting is None:
            # The generation ended here while the commit was in flight; its end was reported.
            return []
        command.check(self._max_gamma, drafting.live.state.vocab_size)
        walk = drafting.commit(command)
        target = drafting.target
        target.observe(walk.verified, has_supports=drafting.live.state.has_supports)
        now = time.monotonic()
        if command.gamma:
            target.pace.observe(now - drafting.committed_at, command.ahead_gamma)
        drafting.committed_at = now
        self._queues.update(drafting)
        return [drafting.proposed(block) for block in drafting.tree.updates()]

    def _close(self, key: GenerationKey, *, keep: bool) -> None:
        drafting = self._drafting.pop(key, None)
        if drafting is None:
            return
        self._queues.remove(key)
        drafting.target.num_open -= 1
        drafting.end()
        self._table.cache_prefix(drafting.live, drafting.tree.committed_len)
        self._table.close(drafting.live, keep=keep)

    def _gather(self) -> list[DraftRow]:
        """The rows of the next pass: needed blocks first, then the most likely extensions."""
        paces = [target.pace for target in self._targets.active]
        num_needed, num_rows = self._budget.num_rows(self._queues.num_needed, paces)
        num_needed, num_rows = (min(n, self._limits.max_rows) for n in (num_needed, num_rows))
        if not num_rows:  # nothing is needed or allowed: idle until the next command
            self._queues.clear_ahead()
        rows = self._with_room(self._queues.needed(num_needed))
        ahead = self._gather_ahead(num_rows - len(rows))
        # Rows gathered later may have preempted the generations of earlier ones.
        return [row for row in rows if row.key in self._drafting] + ahead

    def _with_room(self, rows: Sequence[DraftRow]) -> list[DraftRow]:
        """Reserves KV; the rows that have it, prompts only within the token budget.

        A generation without room fails. One that grows may preempt those opened after it, even if
        their rows have room already.
        """
        short = [row for row in rows if row.num_pending <= _MAX_ROW_TOKENS]
        prompts = [row for row in rows if row.num_pending > _MAX_ROW_TOKENS]
        placed = [row for row in short if self._begin(row.drafting)]
        budget = self._prompt_budget(placed)
        for row in prompts:
            if budget > 0 and self._begin(row.drafting):
                placed.append(row)
                budget -= row.num_pending
        return placed

    def _gather_ahead(self, num_rows: int) -> list[DraftRow]:
        if num_rows <= 0:
            return []
        rows: list[DraftRow] = []
        for drafting, extension in self._queues.ahead(num_rows):
            if not drafting.is_begun and not self._begin(drafting):
                continue
            if not self._is_open(drafting, extension.block):
                continue
            with self._failing_alone(drafting.key):
                block = drafting.opened(extension) if extension.opens else extension.block
                if block is not None and drafting.has_room(block):
                    rows.append(DraftRow(drafting, block))
                elif not extension.opens:  # nothing is drafted ahead until something changes
                    self._queues.drop_ahead(drafting.key)
        return [row for row in rows if self._is_open(row.drafting, row.block)]

    def _is_open(self, drafting: DraftSession, block: DraftBlock) -> bool:
        """Whether the block still exists: another generation may have taken its KV room."""
        return drafting.key in self._drafting and block.is_in(drafting.tree.root)

    def _prompt_budget(self, rows: Sequence[DraftRow]) -> int:
        """Prompt tokens of a pass with these rows.

        At least a quarter of the token budget, so that drafting cannot starve prompts.
        """
        num_row_tokens = sum(row.num_pending for row in rows)
        most = self._limits.max_tokens
        return max(most - num_row_tokens, most // 4, 1)

    def _advance(self, work: Sequence[DraftRow]) -> list[Proposed | Failure]:
        """Runs one forward pass: a token for every short row, prompts within their budget."""
        started_at = time.perf_counter()
        appends: list[Append] = []
        ran: list[tuple[DraftRow, int]] = []
        rows = [row for row in work if row.num_pending <= _MAX_ROW_TOKENS]
        prompts = [row for row in work if row.num_pending > _MAX_ROW_TOKENS]
        budget = self._prompt_budget(rows)
        for row in (*rows, *prompts):
            num_tokens = row.num_pending
            if num_tokens > _MAX_ROW_TOKENS:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
            if not num_tokens:
                break
            appends.append(row.append(num_tokens, self._engine.info.vocab_size))
            ran.append((row, num_tokens))
        self._queues.settle(ran)
        sampling_rows = [
            row for (row, _), part in zip(ran, appends, strict=True) if part.num_logits
        ]
        masks = RowMasks(sampling_rows, self._masks)
        logits = self._engine.forward(appends)
        for row in prompts:
            self._table.cache_prefix(row.drafting.live, row.drafting.tree.committed_len)
        sampled = sample_rows(self._engine, self.health, sampling_rows, logits, masks)
        events = self._apply(sampling_rows, sampled)
        # The time includes sampling: it decides, too, how many rows fit into a round.
        self._observe(appends, time.perf_counter() - started_at)
        return events

    def _begin(self, drafting: DraftSession) -> bool:
        """Reserves KV for the needed block; False if the generation has failed.

        Called right before the first pass, because earlier passes may still cache its prefix.
        """
        if drafting.key not in self._drafting:  # preempted by a generation before it
            return False
        live, committed_len = drafting.live, drafting.tree.committed_len
        context_len = 0 if drafting.is_begun else committed_len
        num_tokens = max(committed_len, drafting.tree.root.last_len)
        with self._failing_alone(drafting.key):
            if self._reserve(live, num_tokens, context_len=context_len, preempts=False) is None:
                return False
            if not drafting.is_begun:
                drafting.is_begun = True
                self._num_prefill_tokens += committed_len - live.sequence.length
            return True
        return False

    def _apply(
        self, rows: Sequence[DraftRow], sampled: Sequence[SampledToken | Exception]
    ) -> list[Proposed | Failure]:
        """Adds each row's token to its tree; an error fails that row's generation only."""
        events: list[Proposed | Failure] = []
        failed: set[GenerationKey] = set()
        for row, token in zip(rows, sampled, strict=True):
            if row.key in failed:
                continue
            if isinstance(token, Exception):
                failed.add(row.key)
                events.append(self._failed(row.key, token))
            else:
                events += self._add_token(row, token)
        return events

    def _add_token(self, row: DraftRow, token: SampledToken) -> list[Proposed]:
        tree, generation = row.drafting.tree, row.drafting.live.state
        candidates: Sequence[tuple[int, float]] = ()
        if tree.looks_ahead:
            acceptance = row.drafting.target.acceptance
            candidates = acceptance.estimate(token, has_supports=generation.has_supports)
        support = SupportWeights(*token.support) if token.support else None
        has_update = tree.add(row.block, token.token_id, support, candidates)
        self._queues.update(row.drafting)
        return [row.drafting.proposed(row.block)] if has_update else []


def _common_prefix_len(cached: Ids, wanted: Ids) -> int:
    size = min(len(cached), len(wanted))
    differing = np.flatnonzero(cached[:size] != wanted[:size])
    return int(differing[0]) if len(differing) else size
