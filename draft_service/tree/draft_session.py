"""One generation at the draft: its session's KV, its speculation tree, and the rows of a pass.

Keeps the tree (what is foreseen) and the KV branches (what is cached of it) in step. Budgets and
other generations are `scheduler_worker`'s. Device thread only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import structlog

from draft_service.messages import Commit, OpenDraft, Proposed
from draft_service.tree.block import DraftBlock, Extension
from draft_service.tree.kv_branches import Branch, KVBranches
from draft_service.tree.targets import ServedTarget
from draft_service.tree.text_tree import TextContext, TextTree
from draft_service.tree.tree import CommitOutcome, SpeculationTree
from outrider.engine import (
    Append,
    KVStore,
    SampledToken,
    Sampler,
    SampleRequest,
    Sequence,
    ServedEngine,
)
from outrider.engine.interface import NUM_CANDIDATES, Ids, Logits
from outrider.errors import KVFull, NonFiniteLogits
from outrider.grammar import GrammarState
from outrider.model_server.failure_policy import PassHealth
from outrider.model_server.grammar_masks import MaskRequest, Masks, MaskThread
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import LiveGeneration
from outrider.sampling.params import Verification

log = structlog.get_logger()


@dataclass(eq=False)
class DraftGeneration:
    """The draft's state of a generation in the session table.

    `vocab_size` is the target's: committed tokens are below it.
    """

    key: GenerationKey
    sampler: Sampler
    verification: Verification
    vocab_size: int
    target: ServedTarget
    prompt_len: int
    # Position in the grammar of the output's format; None: draft tokens are not masked.
    grammar: GrammarState | None = None

    @property
    def has_supports(self) -> bool:
        return self.sampler.params.needs_supports(self.verification)


class DraftSession:
    """Draft of one generation. `live.token_ids` starts with the committed context."""

    def __init__(
        self,
        store: KVStore,
        live: LiveGeneration[DraftGeneration],
        command: OpenDraft,
        text: TextContext | None = None,
    ) -> None:
        """`text`: the context's text, if the target has another tokenizer."""
        self._store = store
        self.live = live
        self.committed_at = time.monotonic()
        # Whether KV was reserved for its first pass.
        self.is_begun = False
        # Whether a token was replaced for want of finite logits; logged once.
        self.has_placeholder = False
        self._branches = KVBranches(store, live.sequence)
        if text is not None:
            self.tree: SpeculationTree = TextTree(
                live.token_ids,
                len(text.token_ids),
                self._branches.main,
                command,
                text.reencoder,
                text.rest,
            )
            return
        self.tree = SpeculationTree(
            live.token_ids,
            len(command.token_ids),
            self._branches.main,
            gamma=command.gamma,
            ahead_gamma=command.ahead_gamma,
            lookahead=command.lookahead,
            fan_out=command.fan_out,
            tells_unlikely=command.tells_unlikely,
        )

    @property
    def key(self) -> GenerationKey:
        return self.live.state.key

    @property
    def target(self) -> ServedTarget:
        return self.live.state.target

    def commit(self, command: Commit) -> CommitOutcome:
        """Like SpeculationTree.commit; also frees the KV of dropped blocks."""
        walk = self.tree.commit(
            command.token_ids, command.committed_len, command.gamma, command.ahead_gamma
        )
        winner = walk.source.branch
        self._branches.free_unused({winner, *(block.branch for block in self.tree.blocks())})
        self._branches.settle(winner, walk.num_right)
        return walk

    def opened(self, extension: Extension) -> DraftBlock | None:
        """Opens the child for the block's most likely alternative; None if there is no KV room."""
        block, tree = extension.block, self.tree
        if not block.alternatives:  # pruned in this step to make room for another session
            return None
        position = block.alternatives[0].position
        fork_len, branch = block.base_len + position, block.branch
        if branch.sequence.length < fork_len:  # `settle` had no room for all of the branch
            tree.give_up(block)
            return None
        longest = len(self.live.token_ids)
        # The most likely child of a complete block continues the same branch, if it fits: blocks
        # may have become longer since the branch was forked.
        is_at_end = block.has_guess and position == len(block.token_ids)
        is_last = is_at_end and not block.is_continued and branch.sequence.length == fork_len
        if is_last and self._extended(branch, min(fork_len + tree.room_for_child, longest)):
            block.is_continued = True
            return tree.open(block, branch)
        max_len = min(fork_len + tree.room_for_branch, longest)
        try:
            fork = self._branches.fork(branch, fork_len, max_len)
        except KVFull:
            tree.give_up(block)
            return None
        return tree.open(block, fork)

    def has_room(self, block: DraftBlock) -> bool:
        """Whether there is KV room for the block's next token; preempts nothing."""
        return self._extended(block.branch, block.end)

    def _extended(self, branch: Branch, max_len: int) -> bool:
        try:
            self._store.extend(branch.sequence, max_len)
        except KVFull:
            return False
        return True

    @property
    def branch_sequences(self) -> list[Sequence]:
        """The sequences that `prune` frees."""
        return self._branches.fork_sequences

    def prune(self) -> None:
        """Drops everything drafted ahead; nothing more is until the next commit."""
        self.tree.prune()
        self._branches.free_unused({self.tree.root.branch})

    def proposed(self, block: DraftBlock) -> Proposed:
        """The block's event; marks all of its tokens as sent."""
        if isinstance(self.tree, TextTree):
            return self.tree.proposed(self.key)
        block.num_sent = len(block.token_ids)
        return Proposed(
            key=self.key,
            assumed_token_ids=self.tree.assumed(block),
            base_len=block.base_len,
            token_ids=tuple(block.token_ids),
            supports=list(block.supports) if block.supports else None,
        )

    def end(self) -> None:
        """Frees all branches and cuts the session's sequence to the committed tokens."""
        self._branches.free_unused(set())
        sequence = self.live.sequence
        self._store.truncate(sequence, min(sequence.length, self.tree.committed_len))


@dataclass(frozen=True)
class DraftRow:
    """One token to sample in a pass: the block's next one, or the guess after the block."""

    drafting: DraftSession
    block: DraftBlock

    @property
    def key(self) -> GenerationKey:
        return self.drafting.key

    @property
    def num_pending(self) -> int:
        """Tokens of the path without KV; the last one's logits give the row's token."""
        return self.block.end - self.block.branch.sequence.length

    @property
    def is_committed(self) -> bool:
        """Whether all tokens before the one to sample are committed."""
        return self.block.end <= self.drafting.tree.committed_len

    def append(self, num_tokens: int, num_known: int) -> Append:
        """The first `num_tokens` pending tokens. `num_known` is the draft's vocabulary size.

        Token 0 replaces ids outside that vocabulary, which a padded target may emit.
        """
        sequence = self.block.branch.sequence
        pending = self.drafting.tree.tokens(self.block, sequence.length)
        known = [token if token < num_known else 0 for token in pending[:num_tokens]]
        return Append(sequence, known, int(num_tokens == len(pending)))

    def mask_request(self, grammar: GrammarState) -> MaskRequest:
        prompt_len = self.drafting.live.state.prompt_len
        output_ids = self.drafting.tree.context(self.block)[prompt_len : self.block.end]
        return MaskRequest(grammar, output_ids, len(output_ids), 1)

    def ask(self, forbidden: Ids | None) -> SampleRequest:
        """`forbidden`: mask of the output's format."""
        block, tree, generation = self.block, self.drafting.tree, self.drafting.live.state
        return SampleRequest(
            generation.sampler,
            lambda: tree.context(block),
            block.end,
            block.base_len,
            generation.verification,
            is_guess=block.is_complete,
            forbidden=forbidden,
        )

    def placeholder(self, error: NonFiniteLogits) -> SampledToken:
        """Token 0 with probability 1, as a sample for draft tokens without finite logits.

        With supports the number of candidates is the usual one, because the order of drafting must
        not depend on the draft tokens. Otherwise there are none.
        """
        drafting, generation = self.drafting, self.drafting.live.state
        if not drafting.has_placeholder:
            drafting.has_placeholder = True
            log.warning("draft_token_replaced", session_id=drafting.live.session_id, why=str(error))
        certain = (np.zeros(1, np.int64), np.ones(1, np.float32))
        has_support = generation.has_supports and not self.block.is_complete
        num_candidates = min(NUM_CANDIDATES, generation.vocab_size)
        candidates = np.arange(num_candidates if generation.has_supports else 0)
        scores = np.zeros(len(candidates), np.float32)
        return SampledToken(0, certain if has_support else None, candidates, scores)


class RowMasks:
    """Masks of the formats of a pass's rows; computed while the pass runs, so create it before.

    A row without a mask is sampled from all tokens: its draft tokens break the format, or follow
    EOS, and are rejected anyway.
    """

    def __init__(self, rows: Seq[DraftRow], masks: MaskThread) -> None:
        grammars = [row.drafting.live.state.grammar for row in rows]
        self._where = [i for i, grammar in enumerate(grammars) if grammar is not None]
        self._num_rows = len(rows)
        self._masks = (
            masks.start([row.mask_request(g) for row, g in zip(rows, grammars, strict=True) if g])
            if self._where
            else None
        )

    def forbidden(self) -> list[Ids | None]:
        """For each row. Waits until they are computed."""
        found: list[Ids | None] = [None] * self._num_rows
        if self._masks is not None:
            for index, masks in zip(self._where, self._masks.result(), strict=True):
                if isinstance(masks, Masks) and masks.num_live:
                    found[index] = masks.forbidden
        return found


def sample_rows(
    engine: ServedEngine,
    health: PassHealth,
    rows: Seq[DraftRow],
    logits: Logits,
    masks: RowMasks,
) -> list[SampledToken | Exception]:
    """Samples a token for each row; a row's own error in its place.

    NaN or infinite logits after draft tokens give a placeholder instead of an error: dropping the
    draft tokens would bias the output (docs/concepts/exactness.md). Such rows do not count as
    failed passes.
    """
    results: list[SampledToken | Exception] = []
    observed: list[SampledToken | Exception] = []
    forbidden = masks.forbidden()
    asks = [row.ask(mask) for row, mask in zip(rows, forbidden, strict=True)]
    sampled = engine.sample(asks, logits)
    for row, token in zip(rows, sampled, strict=True):
        if isinstance(token, NonFiniteLogits) and not row.is_committed:
            results.append(row.placeholder(token))
        else:
            results.append(token)
            observed.append(token)
    health.observe(observed)
    return results
