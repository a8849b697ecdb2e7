"""The device thread's half of the draft: sessions, trees, one batched model step for all of them.

A step applies what has come in (so stale drafting stops within one step), then draws one token for
every row: first the blocks that somebody waits for, oldest first, then what the trees offer to
draft ahead of the verdict, likeliest first, as far as it costs the others little (`rows`). Knows
nothing of streams, protobuf or asyncio; every method is called on the device thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import numpy as np

from draft_service.messages import (
    Command,
    Commit,
    DraftStatistics,
    Ids,
    OpenDraft,
    Proposed,
    SupportWeights,
)
from draft_service.tree.acceptance import DraftAcceptance
from draft_service.tree.block import DraftBlock
from draft_service.tree.draft_session import DraftGeneration, DraftRow, DraftSession
from draft_service.tree.row_budget import RowBudget, best_extensions
from outrider.engine import Append, SampledToken, ServedEngine
from outrider.engine import Sequence as KVSequence
from outrider.errors import InvalidRequest
from outrider.model_server.messages import Close, Failure, Forget
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import LiveGeneration
from outrider.model_server.step_costs import StepCosts
from outrider.model_server.worker import GenerationWorker, Reclaimable

# A row with more tokens than this that the model has not seen is a prompt: it is run in chunks.
_MAX_ROW_TOKENS = 16
# The orchestrator asks for 4 at most; a tree's depth is also that of the stack that walks it.
_MAX_LOOKAHEAD = 16


class Proposer(GenerationWorker[Command, Proposed, DraftGeneration, DraftRow]):
    """Owns the engine's sequences. The settings as in DraftConfig."""

    def __init__(
        self,
        engine: ServedEngine,
        *,
        max_gamma: int,
        max_step_tokens: int,
        max_branches: int,
        idle_session_ttl_s: float,
        prefix_cache: bool = True,
    ) -> None:
        super().__init__(
            engine,
            StepCosts(),
            max_step_tokens=max_step_tokens,
            idle_session_ttl_s=idle_session_ttl_s,
            prefix_cache=prefix_cache,
        )
        self._max_gamma = max_gamma
        self._drafting: dict[GenerationKey, DraftSession] = {}
        # Those with a row: waited for, oldest first; and with something to draft ahead.
        self._needed: dict[GenerationKey, DraftSession] = {}
        self._ahead: dict[GenerationKey, DraftSession] = {}
        self._budget = RowBudget(self.costs, max_branches)
        self._acceptance = DraftAcceptance()

    @property
    def has_work(self) -> bool:
        return bool(self._needed or self._ahead)

    def statistics(self) -> DraftStatistics:
        return DraftStatistics(**self._counts(), num_waiting_generations=len(self._needed))

    def _context_of(self, command: Command) -> Ids | None:
        return command.token_ids if isinstance(command, OpenDraft) else None

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
        self._check(command)
        committed_len = len(command.token_ids)
        max_len = min(command.max_len, self._engine.info.max_context_len)
        if max_len < committed_len + 2:
            raise InvalidRequest("token_ids", f"{committed_len} leave no room in {max_len}")
        sampler = self._engine.sampler(command.params, command.prompt_len, command.vocab_size)
        generation = DraftGeneration(command.key, sampler, command.verification, command.vocab_size)
        live = self._opened(
            command.session_id, command.epoch, None, max_len, (0, time.monotonic()), generation
        )
        num_same = _common_prefix_len(live.token_ids[: live.sequence.length], command.token_ids)
        # The last token is run again: its logits draw the next one.
        self._table.cut(live, min(num_same, committed_len - 1))
        live.token_ids[:committed_len] = command.token_ids
        drafting = DraftSession(self._engine.store, live, command)
        self._drafting[command.key] = drafting
        self._line_up(drafting)

    def _reclaims(
        self, live: LiveGeneration[DraftGeneration], *, preempts: bool
    ) -> list[Reclaimable]:
        """Branches drafted ahead go first, a tree at a time: that of the oldest commit first."""
        trees = sorted(self._drafting.values(), key=lambda drafting: drafting.committed_at)
        branches = [Reclaimable(tree.branch_sequences, tree.prune) for tree in trees]
        return [*branches, *super()._reclaims(live, preempts=preempts)]

    def _sequences_of(self, live: LiveGeneration[DraftGeneration]) -> Collection[KVSequence]:
        return (live.sequence, *self._drafting[live.state.key].branch_sequences)

    def _check(self, command: OpenDraft) -> None:
        if command.key in self._drafting:
            raise InvalidRequest("generation_id", f"{command.key.generation_id} is open already")
        if not len(command.token_ids):
            raise InvalidRequest("token_ids", "must not be empty")
        if not 1 <= command.prompt_len <= len(command.token_ids):
            raise InvalidRequest("prompt_len", f"{command.prompt_len} is not within the context")
        if command.vocab_size < 1 or command.token_ids.max() >= command.vocab_size:
            raise InvalidRequest("token_ids", f"must be in [0, {command.vocab_size})")
        if command.lookahead > _MAX_LOOKAHEAD:
            raise InvalidRequest("lookahead", f"{command.lookahead} exceeds {_MAX_LOOKAHEAD}")
        self._check_gamma(command.gamma, command.ahead_gamma)
        command.params.validate(command.vocab_size)

    def _check_gamma(self, gamma: int, ahead_gamma: int) -> None:
        for name, value in (("gamma", gamma), ("ahead_gamma", ahead_gamma)):
            if value > self._max_gamma:
                raise InvalidRequest(name, f"{value} exceeds {self._max_gamma}")

    def _commit(self, command: Commit) -> list[Proposed]:
        """What it asks for may be here: a block that was unlikely, or is cut short by it."""
        drafting = self._drafting.get(command.key)
        if drafting is None:
            # Lost or closed here while the commit was on its way: already said, nothing to do.
            return []
        self._check_gamma(command.gamma, command.ahead_gamma)
        vocab_size = drafting.live.state.vocab_size
        if max(command.token_ids, default=0) >= vocab_size:
            raise InvalidRequest("token_ids", f"must be in [0, {vocab_size})")
        walk = drafting.commit(command)
        self._acceptance.judged(walk.judged, has_supports=drafting.live.state.has_supports)
        now = time.monotonic()
        if command.gamma:
            self._budget.observe_round(now - drafting.committed_at, command.ahead_gamma)
        drafting.committed_at = now
        self._line_up(drafting)
        return [drafting.proposed(block) for block in drafting.tree.updates()]

    def _line_up(self, drafting: DraftSession) -> None:
        """After a change: who waits keeps its place in the queue, or joins its end."""
        key = drafting.key
        if not drafting.tree.is_needed:
            self._needed.pop(key, None)
        elif key not in self._needed:
            self._needed[key] = drafting
        self._ahead[key] = drafting

    def _close(self, key: GenerationKey, *, keep: bool) -> None:
        drafting = self._drafting.pop(key, None)
        if drafting is None:
            return
        self._needed.pop(key, None)
        self._ahead.pop(key, None)
        drafting.end()
        self._table.cache_prefix(drafting.live, drafting.tree.committed_len)
        self._table.close(drafting.live, keep=keep)

    def _gather(self) -> list[DraftRow]:
        """Rows that are waited for, then the best of what the trees offer."""
        num_needed, num_rows = self._budget.num_rows(len(self._needed))
        if not num_rows:  # nobody waits and nothing may be drafted ahead: idle until told more
            self._ahead.clear()
        needed = list(self._needed.values())[:num_needed]
        rows = self._with_room([DraftRow(drafting, drafting.tree.root) for drafting in needed])
        ahead = self._gather_ahead(num_rows - len(rows))
        # Some may have lost their room to sessions that began with what is drafted ahead.
        return [row for row in rows if row.key in self._drafting] + ahead

    def _with_room(self, rows: Sequence[DraftRow]) -> list[DraftRow]:
        """Those that have room for their tokens: of prompts as many as the budget may take.

        A session without room is lost, and so may be those that were opened after it.
        """
        short = [row for row in rows if row.num_pending <= _MAX_ROW_TOKENS]
        prompts = [row for row in rows if row.num_pending > _MAX_ROW_TOKENS]
        placed = [row for row in short if self._begin(row.drafting)]
        budget = self._prompt_budget(placed)
        for row in prompts:
            if budget > 0 and self._begin(row.drafting):
                placed.append(row)
                budget -= row.num_pending
        return [row for row in placed if row.key in self._drafting]

    def _gather_ahead(self, num_rows: int) -> list[DraftRow]:
        if num_rows <= 0:
            return []
        rows: list[DraftRow] = []
        for drafting, extension in best_extensions(self._ahead, num_rows):
            if not drafting.is_begun and not self._begin(drafting):
                continue
            if not self._holds(drafting, extension.block):
                continue
            block = drafting.opened(extension) if extension.opens else extension.block
            if block is not None and drafting.has_room(block):
                rows.append(DraftRow(drafting, block))
            elif not extension.opens:  # nothing is drafted ahead until something changes
                self._ahead.pop(drafting.key, None)
        return [row for row in rows if self._holds(row.drafting, row.block)]

    def _holds(self, drafting: DraftSession, block: DraftBlock) -> bool:
        """Whether the block has not been dropped for the room of a session that begins."""
        return drafting.key in self._drafting and block.is_in(drafting.tree.root)

    def _prompt_budget(self, rows: Sequence[DraftRow]) -> int:
        """Tokens of prompts in a pass beside these rows; a quarter of all is the prompts' own."""
        num_row_tokens = sum(row.num_pending for row in rows)
        return max(self._max_step_tokens - num_row_tokens, self._max_step_tokens // 4, 1)

    def _advance(self, work: Sequence[DraftRow]) -> list[Proposed | Failure]:
        """One forward pass: a token for every row, then prompts within what the budget leaves.

        A quarter of the budget is the prompts' own, so that drafting never starves them.
        """
        started_at = time.perf_counter()
        appends: list[Append] = []
        sampling_rows: list[DraftRow] = []
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
            if appends[-1].num_logits:
                sampling_rows.append(row)
        logits = self._engine.forward(appends)
        for row in prompts:
            self._table.cache_prefix(row.drafting.live, row.drafting.tree.committed_len)
        sampled = self._engine.sample([row.ask() for row in sampling_rows], logits)
        self.health.observe(sampled)
        events = self._sampled(sampling_rows, sampled)
        # With what it takes around the pass: that, too, decides how many rows a round has time for.
        self._observe(appends, time.perf_counter() - started_at)
        return events

    def _begin(self, drafting: DraftSession) -> bool:
        """Room for the block that is waited for, or False where the session is lost.

        Before the first pass: not sooner, for what the passes till then may cache.
        """
        if drafting.key not in self._drafting:  # it was lost for the room of one before it
            return False
        live, committed_len = drafting.live, drafting.tree.committed_len
        context_len = 0 if drafting.is_begun else committed_len
        num_tokens = max(committed_len, drafting.tree.root.last_len)
        if self._reserve(live, num_tokens, context_len=context_len, preempts=False) is None:
            return False
        if not drafting.is_begun:
            drafting.is_begun = True
            self._num_prefill_tokens += committed_len - live.sequence.length
        return True

    def _sampled(
        self, sampling_rows: Sequence[DraftRow], sampled: Sequence[SampledToken | Exception]
    ) -> list[Proposed | Failure]:
        """What comes of a token for each of the rows."""
        events: list[Proposed | Failure] = []
        failed: set[GenerationKey] = set()
        for row, token in zip(sampling_rows, sampled, strict=True):
            if row.key in failed:
                continue
            if isinstance(token, Exception):  # this generation's own; the others go on
                failed.add(row.key)
                events.append(self._failed(row.key, token))
            else:
                events += self._extended(row, token)
        return events

    def _extended(self, row: DraftRow, token: SampledToken) -> list[Proposed]:
        tree, generation = row.drafting.tree, row.drafting.live.state
        candidates: Sequence[tuple[int, float]] = ()
        if tree.looks_ahead:
            candidates = self._acceptance.of(token, has_supports=generation.has_supports)
        support = SupportWeights(*token.support) if token.support else None
        has_update = tree.add(row.block, token.token_id, support, candidates)
        self._line_up(row.drafting)
        return [row.drafting.proposed(row.block)] if has_update else []


def _common_prefix_len(held: Ids, wanted: Ids) -> int:
    size = min(len(held), len(wanted))
    differing = np.flatnonzero(held[:size] != wanted[:size])
    return int(differing[0]) if len(differing) else size
